//! What parts of a JSON Schema demand of one text together, which costs the compiler more than the schema is long: intersected regular
//! expressions take time and memory exponential in their number, patterns of keys are compared in pairs. What single numbers and patterns
//! cost is bounded where they are compiled.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use serde_json::{Map, Value};

/// Patterns and formats that one text must have at a time. Of more the compiler mostly finds no text.
const MAX_PATTERNS: usize = 5;
/// Patterns of the keys of one object.
const MAX_KEY_PATTERNS: usize = 64;
/// Schemas and members looked at and put together.
const MAX_WORK: usize = 1_000_000;

/// Refuses a schema that demands too much of one text. Needs stack for as many schemas as refer to each other in a row.
pub(crate) fn check(schema: &Value) -> Result<(), String> {
    let mut reader = Reader { root: schema, references: HashMap::new(), work: 0 };
    let demands = reader.read(schema);
    reader.check(&demands)?;
    match reader.work > MAX_WORK {
        true => Err("it combines too many schemas with each other".to_owned()),
        false => Ok(()),
    }
}

/// What is demanded of a value.
#[derive(Default, Clone)]
struct Demands {
    /// Patterns and formats of a text.
    patterns: usize,
    /// Patterns of an object's keys.
    keys: usize,
    /// Of its named members and items.
    members: BTreeMap<String, Rc<Demands>>,
    /// Of other members and items.
    others: Option<Rc<Demands>>,
}

struct Reader<'a> {
    root: &'a Value,
    /// What is referred to; `None` while it is read.
    references: HashMap<&'a str, Option<Rc<Demands>>>,
    work: usize,
}

impl<'a> Reader<'a> {
    fn read(&mut self, schema: &'a Value) -> Rc<Demands> {
        self.work += 1;
        let Value::Object(schema) = schema else { return Rc::default() };
        if self.work > MAX_WORK {
            return Rc::default();
        }
        let mut all = vec![Rc::new(self.own(schema))];
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            all.push(self.referred(reference));
        }
        if let Some(parts) = schema.get("allOf").and_then(Value::as_array) {
            all.extend(parts.iter().map(|part| self.read(part)));
        }
        for keyword in ["anyOf", "oneOf"] {
            if let Some(parts) = schema.get(keyword).and_then(Value::as_array) {
                let parts: Vec<_> = parts.iter().map(|part| self.read(part)).collect();
                all.extend(parts.into_iter().reduce(|a, b| self.join(&a, &b, usize::max)));
            }
        }
        all.into_iter().reduce(|a, b| self.join(&a, &b, usize::saturating_add)).unwrap_or_default()
    }

    /// Without what the schema is combined with.
    fn own(&mut self, schema: &'a Map<String, Value>) -> Demands {
        let mut demands = Demands {
            patterns: ["pattern", "format"].iter().filter(|&&keyword| schema.contains_key(keyword)).count(),
            ..Demands::default()
        };
        for (name, member) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            demands.members.insert(format!(".{name}"), self.read(member));
        }
        // Drafts before 2020-12 have a list of `items`.
        for keyword in ["prefixItems", "items"] {
            for (i, item) in schema.get(keyword).and_then(Value::as_array).into_iter().flatten().enumerate() {
                let (place, mut item) = (i.to_string(), self.read(item));
                if let Some(other) = demands.members.get(&place) {
                    item = self.join(&Rc::clone(other), &item, usize::max);
                }
                demands.members.insert(place, item);
            }
        }
        let mut others = Vec::new();
        for (_, member) in schema.get("patternProperties").and_then(Value::as_object).into_iter().flatten() {
            demands.keys += 1;
            others.push(self.read(member));
        }
        for keyword in ["additionalProperties", "items", "additionalItems"] {
            others.extend(schema.get(keyword).map(|member| self.read(member)));
        }
        demands.others = others.into_iter().reduce(|a, b| self.join(&a, &b, usize::max));
        demands
    }

    fn referred(&mut self, reference: &'a str) -> Rc<Demands> {
        if let Some(known) = self.references.get(reference) {
            // What refers to itself is compiled as a rule of its own.
            return known.clone().unwrap_or_default();
        }
        self.references.insert(reference, None);
        let target = reference.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer));
        let demands = target.map(|target| self.read(target)).unwrap_or_default();
        self.references.insert(reference, Some(Rc::clone(&demands)));
        demands
    }

    /// Both, place by place; `join` says what becomes of two numbers.
    fn join(&mut self, a: &Demands, b: &Demands, join: fn(usize, usize) -> usize) -> Rc<Demands> {
        self.work += 1 + a.members.len() + b.members.len();
        if self.work > MAX_WORK {
            return Rc::default();
        }
        let mut both = Demands {
            patterns: join(a.patterns, b.patterns),
            keys: join(a.keys, b.keys),
            members: a.members.clone(),
            others: None,
        };
        for (name, member) in &b.members {
            let joined = match both.members.get(name) {
                Some(other) => self.join(&Rc::clone(other), member, join),
                None => Rc::clone(member),
            };
            both.members.insert(name.clone(), joined);
        }
        both.others = match (&a.others, &b.others) {
            (Some(a), Some(b)) => Some(self.join(a, b, join)),
            (a, b) => a.clone().or(b.clone()),
        };
        Rc::new(both)
    }

    fn check(&mut self, demands: &Demands) -> Result<(), String> {
        self.work += 1;
        if self.work > MAX_WORK {
            return Ok(());
        }
        if demands.patterns > MAX_PATTERNS {
            return Err(format!(
                "at most {MAX_PATTERNS} patterns and formats can be demanded of one string, got {}",
                demands.patterns
            ));
        }
        if demands.keys > MAX_KEY_PATTERNS {
            return Err(format!(
                "it must have at most {MAX_KEY_PATTERNS} patternProperties of one object, got {}",
                demands.keys
            ));
        }
        for member in demands.members.values() {
            match &demands.others {
                // They may hold for a named one, too.
                Some(others) => {
                    let both = self.join(member, others, usize::saturating_add);
                    self.check(&both)?;
                }
                None => self.check(member)?,
            }
        }
        demands.others.as_ref().map_or(Ok(()), |others| self.check(others))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::check;

    fn patterns(count: usize) -> Vec<Value> {
        (0..count).map(|i| json!({"pattern": format!(".*{i}.*")})).collect()
    }

    #[test]
    fn what_is_demanded_of_one_text_is_bounded() {
        for count in [5, 6, 24] {
            let chain: serde_json::Map<String, Value> = (0..count)
                .map(|i| (format!("d{i}"), json!({"format": "date", "$ref": format!("#/$defs/d{}", i + 1)})))
                .collect();
            let member = |schema: &Value| json!({"properties": {"x": schema}});
            let item = |schema: &Value| json!({"items": schema});
            let keys: serde_json::Map<String, Value> =
                (0..12 * count).map(|i| (format!("^a{i}x$"), json!({}))).collect();
            let half = |from: usize| {
                Value::from(patterns(count)[from * count / 2..][..count / 2 + from * (count % 2)].to_vec())
            };
            let schemas = [
                json!({"type": "string", "allOf": patterns(count)}),
                json!({"allOf": patterns(count).iter().map(member).collect::<Vec<_>>()}),
                json!({"properties": {"a": {"allOf": patterns(count).iter().map(item).collect::<Vec<_>>()}}}),
                json!({"$ref": "#/$defs/d0", "$defs": chain}),
                json!({"patternProperties": keys}),
                json!({"properties": {"x": {"allOf": half(0)}}, "additionalProperties": {"allOf": half(1)}}),
                json!({"anyOf": [{}, {"allOf": patterns(count)}]}),
                json!({"allOf": patterns(count).iter().map(|p| json!({"items": [p]})).collect::<Vec<_>>()}),
                json!({"items": [{"allOf": half(0)}], "additionalItems": {"allOf": half(1)}}),
            ];
            for schema in schemas {
                assert_eq!(check(&schema).is_ok(), count <= 5, "{schema}");
            }
        }
    }

    #[test]
    fn many_patterns_in_different_places_are_possible() {
        let members: serde_json::Map<String, Value> =
            (0..500).map(|i| (format!("x{i}"), json!({"pattern": "a", "format": "date"}))).collect();
        let schema = json!({
            "anyOf": patterns(100),
            "properties": members,
            "allOf": [{"properties": {"y": {"anyOf": patterns(50)}}}, {"properties": {"z": {"$ref": "#"}}}],
        });
        assert_eq!(check(&schema), Ok(()));
    }

    #[test]
    fn schemas_that_combine_each_other_again_and_again_are_refused_soon() {
        let defs: serde_json::Map<String, Value> = (0..60)
            .map(|i| {
                let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
                let part = |a: &str, b: &str| json!({"properties": {a: next, b: next}});
                (format!("d{i}"), json!({"allOf": [part("a", "b"), part("a", "b")]}))
            })
            .collect();
        let error = check(&json!({"$ref": "#/$defs/d0", "$defs": defs})).unwrap_err();
        assert!(error.contains("too many schemas"), "{error}");
    }
}
