//! The lenient half of a request: JSON whose fields are looked at one by one, so that every complaint names its field.
//!
//! Nothing is built that the body's size does not bound: unknown fields are skipped, arrays are counted before they are kept.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, de::DeserializeSeed};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::error::ApiError;

/// Levels of arrays and objects that a body may have.
const MAX_NESTING: usize = 128;

/// The whole body, checked for encoding and nesting; it may begin with a byte order mark.
pub(crate) fn document(body: &[u8]) -> Result<&RawValue, ApiError> {
    let text =
        std::str::from_utf8(body).map_err(|_| ApiError::body("The request body is not valid UTF-8."))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if nesting(text.as_bytes()) > MAX_NESTING {
        return Err(ApiError::body(format!("The request body is nested deeper than {MAX_NESTING} levels.")));
    }
    parse(text).map_err(|e| ApiError::body(format!("The request body is not valid JSON: {e}.")))
}

/// Parses with the nesting already bounded by [`document`], so that the parser's own limit (127) does not cut in.
fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> serde_json::Result<T> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    deserializer.disable_recursion_limit();
    let value = T::deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// The deepest level of brackets outside strings. Means something only for valid JSON, but never less than what a parser
/// would descend before it finds the error.
fn nesting(text: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string) = (0usize, 0, false);
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if in_string => {
                bytes.next();
            }
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// A value and the path that leads to it, such as `messages.0.content`; the root's is empty.
#[derive(Debug, Clone)]
pub(crate) struct Field<'a> {
    path: String,
    raw: &'a RawValue,
}

/// An object's known fields.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    path: String,
    fields: Vec<(&'static str, &'a RawValue)>,
    /// Names of a few others.
    unknown: Vec<String>,
}

impl<'a> Field<'a> {
    pub(crate) fn root(raw: &'a RawValue) -> Field<'a> {
        Field { path: String::new(), raw }
    }

    /// A document within another, found there.
    pub(crate) fn at(path: &str, raw: &'a RawValue) -> Field<'a> {
        Field { path: path.to_owned(), raw }
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The text as it was sent.
    pub(crate) fn text(&self) -> &'a str {
        self.raw.get()
    }

    /// What is wrong with this field.
    pub(crate) fn error(&self, message: impl fmt::Display) -> ApiError {
        ApiError::invalid(&self.path, message)
    }

    fn expected(&self, what: &str) -> ApiError {
        match self.path.as_str() {
            "" => ApiError::body(format!("The request body must be {what}, got {}.", self.kind())),
            path => self.error(format!("{path} must be {what}, got {}.", self.kind())),
        }
    }

    /// What a parser says of something within.
    fn invalid(&self, error: &serde_json::Error) -> ApiError {
        match self.path.as_str() {
            "" => ApiError::body(format!("The request body is not valid: {error}.")),
            path => self.error(format!("{path} is not valid: {error}.")),
        }
    }

    fn kind(&self) -> &'static str {
        match self.text().as_bytes().first() {
            Some(b'"') => "a string",
            Some(b'[') => "an array",
            Some(b'{') => "an object",
            Some(b't' | b'f') => "a boolean",
            Some(b'n') => "null",
            _ => "a number",
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        self.text() == "null"
    }

    pub(crate) fn is_string(&self) -> bool {
        self.text().starts_with('"')
    }

    pub(crate) fn is_array(&self) -> bool {
        self.text().starts_with('[')
    }

    pub(crate) fn is_object(&self) -> bool {
        self.text().starts_with('{')
    }

    pub(crate) fn bool(&self) -> Result<bool, ApiError> {
        match self.text() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(self.expected("a boolean")),
        }
    }

    pub(crate) fn string(&self) -> Result<String, ApiError> {
        if !self.is_string() {
            return Err(self.expected("a string"));
        }
        parse(self.text()).map_err(|_| self.expected("a string of valid Unicode"))
    }

    /// An integer. `1e2` and `100.0` are 100; fractions, strings and booleans are not integers.
    pub(crate) fn int(&self) -> Result<i64, ApiError> {
        if let Ok(int) = self.text().parse() {
            return Ok(int);
        }
        // 2^53: beyond, a float no longer tells which integer was meant.
        match parse::<f64>(self.text()) {
            Ok(float) if float.fract() == 0.0 && float.abs() <= 9_007_199_254_740_992.0 => Ok(float as i64),
            Ok(_) if self.kind() == "a number" => Err(self.error(format!(
                "{} must be an integer of 64 bits, got {}.",
                self.path,
                excerpt(self.text())
            ))),
            _ => Err(self.expected("an integer")),
        }
    }

    pub(crate) fn number(&self) -> Result<f64, ApiError> {
        if self.kind() != "a number" {
            return Err(self.expected("a number"));
        }
        parse(self.text()).map_err(|_| self.error(format!("{} must be a finite number.", self.path)))
    }

    /// The elements of an array of at most `max`.
    pub(crate) fn array(&self, max: usize) -> Result<Vec<Field<'a>>, ApiError> {
        if !self.is_array() {
            return Err(self.expected("an array"));
        }
        let elements = seeded(self.text(), Elements { max })
            .map_err(|_| self.error(format!("{} has more than {max} elements.", self.path)))?;
        let element = |(i, raw)| Field { path: join(&self.path, &i), raw };
        Ok(elements.into_iter().enumerate().map(element).collect())
    }

    /// An array of token ids.
    pub(crate) fn ids(&self) -> Result<Vec<u32>, ApiError> {
        if !self.is_array() {
            return Err(self.expected("an array of token ids"));
        }
        parse::<Vec<Id>>(self.text())
            .map_err(|_| self.error(format!("{} must hold token ids, integers from 0.", self.path)))
            .map(|ids| ids.into_iter().map(|Id(id)| id).collect())
    }

    /// An object, of which `known` fields are kept.
    pub(crate) fn object(&self, known: &'static [&'static str]) -> Result<Object<'a>, ApiError> {
        if !self.is_object() {
            return Err(self.expected("an object"));
        }
        let (fields, unknown) = seeded(self.text(), Known(known)).map_err(|e| self.invalid(&e))?;
        Ok(Object { path: self.path.clone(), fields, unknown })
    }

    /// An object of at most `max` entries, those with equal keys included, of which the last is kept.
    pub(crate) fn entries(&self, max: usize) -> Result<Vec<(String, Field<'a>)>, ApiError> {
        if !self.is_object() {
            return Err(self.expected("an object"));
        }
        let entries = seeded(self.text(), Entries { max }).map_err(|e| match e.classify() {
            Category::Data => self.error(format!("{} has more than {max} entries.", self.path)),
            _ => self.invalid(&e),
        })?;
        Ok(entries
            .into_iter()
            .map(|(key, raw)| {
                let path = join(&self.path, &key);
                (key, Field { path, raw })
            })
            .collect())
    }

    /// Any JSON, of at most `max_bytes`: a tree in memory is up to fifty times larger than its text.
    pub(crate) fn value(&self, max_bytes: usize) -> Result<serde_json::Value, ApiError> {
        if self.text().len() > max_bytes {
            return Err(self.error(format!("{} is longer than {max_bytes} bytes.", self.path)));
        }
        parse(self.text()).map_err(|e| self.invalid(&e))
    }
}

impl<'a> Object<'a> {
    /// Names of fields that mean nothing here, a few of them.
    pub(crate) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// A field that is there and not null.
    pub(crate) fn field(&self, name: &'static str) -> Option<Field<'a>> {
        let (_, raw) = self.fields.iter().find(|(known, _)| *known == name)?;
        let field = Field { path: join(&self.path, &name), raw };
        (!field.is_null()).then_some(field)
    }

    /// A field that must be there.
    pub(crate) fn required(&self, name: &'static str) -> Result<Field<'a>, ApiError> {
        self.field(name).ok_or_else(|| {
            let path = join(&self.path, &name);
            ApiError::invalid(&path, format!("{path} is required."))
        })
    }

    pub(crate) fn bool(&self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.field(name).map(|f| f.bool()).transpose()
    }

    pub(crate) fn int(&self, name: &'static str) -> Result<Option<i64>, ApiError> {
        self.field(name).map(|f| f.int()).transpose()
    }

    pub(crate) fn number(&self, name: &'static str) -> Result<Option<f64>, ApiError> {
        self.field(name).map(|f| f.number()).transpose()
    }

    pub(crate) fn string(&self, name: &'static str) -> Result<Option<String>, ApiError> {
        self.field(name).map(|f| f.string()).transpose()
    }
}

/// At most 200 characters of what a client sent, for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const MAX: usize = 200;
    match text.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn join(path: &str, name: &impl fmt::Display) -> String {
    let path = if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
    excerpt(&path)
}

fn seeded<'a, S: DeserializeSeed<'a>>(text: &'a str, seed: S) -> serde_json::Result<S::Value> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    deserializer.disable_recursion_limit();
    seed.deserialize(&mut deserializer)
}

/// A token's id, in any way to write an integer.
struct Id(u32);

impl<'a> Deserialize<'a> for Id {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Id, D::Error> {
        deserializer.deserialize_u32(IdVisitor)
    }
}

struct IdVisitor;

impl Visitor<'_> for IdVisitor {
    type Value = Id;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer from 0")
    }

    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Id, E> {
        u32::try_from(id).map(Id).map_err(|_| E::invalid_value(Unexpected::Unsigned(id), &self))
    }

    fn visit_f64<E: serde::de::Error>(self, id: f64) -> Result<Id, E> {
        match id.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&id) {
            true => Ok(Id(id as u32)),
            false => Err(E::invalid_value(Unexpected::Float(id), &self)),
        }
    }
}

struct Elements {
    max: usize,
}

impl<'a> DeserializeSeed<'a> for Elements {
    type Value = Vec<&'a RawValue>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'a> Visitor<'a> for Elements {
    type Value = Vec<&'a RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of at most {} elements", self.max)
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            if elements.len() == self.max {
                return Err(serde::de::Error::invalid_length(self.max + 1, &self));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}

/// Names of unknown fields that are kept.
const MAX_UNKNOWN: usize = 8;

struct Known(&'static [&'static str]);

impl<'a> DeserializeSeed<'a> for Known {
    type Value = (Vec<(&'static str, &'a RawValue)>, Vec<String>);

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for Known {
    type Value = (Vec<(&'static str, &'a RawValue)>, Vec<String>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields: Vec<(&'static str, &'a RawValue)> = Vec::new();
        let mut unknown = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let Some(&name) = self.0.iter().find(|name| **name == key) else {
                map.next_value::<IgnoredAny>()?;
                if unknown.len() < MAX_UNKNOWN {
                    unknown.push(key);
                }
                continue;
            };
            let raw = map.next_value()?;
            match fields.iter_mut().find(|(known, _)| *known == name) {
                Some(field) => field.1 = raw,
                None => fields.push((name, raw)),
            }
        }
        Ok((fields, unknown))
    }
}

struct Entries {
    max: usize,
}

impl<'a> DeserializeSeed<'a> for Entries {
    type Value = Vec<(String, &'a RawValue)>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for Entries {
    type Value = Vec<(String, &'a RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of at most {} entries", self.max)
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries: Self::Value = Vec::new();
        let mut count = 0;
        while let Some(key) = map.next_key::<String>()? {
            let raw = map.next_value()?;
            count += 1;
            if count > self.max {
                return Err(serde::de::Error::invalid_length(count, &self));
            }
            match entries.iter_mut().find(|(known, _)| *known == key) {
                Some(entry) => entry.1 = raw,
                None => entries.push((key, raw)),
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_up_to_the_limit() {
        for (depth, ok) in [(128, true), (129, false), (1_000_000, false)] {
            let text = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
            assert_eq!(document(text.as_bytes()).is_ok(), ok, "{depth}");
        }
        assert!(document(format!(r#""{}""#, "[".repeat(1000)).as_bytes()).is_ok());
        assert!(document(r#"{"a\"[[":"\\"}"#.as_bytes()).is_ok());
        assert!(document(b"\xef\xbb\xbf{}").is_ok());
        assert!(document(b"{} x").is_err());
        assert!(document(b"\"\xff\"").is_err());
    }

    #[test]
    fn integers() {
        let int = |text: &str| {
            let raw = document(text.as_bytes()).unwrap();
            Field { path: "n".to_owned(), raw }.int().map_err(|e| e.to_string())
        };
        assert_eq!(int("1e2"), Ok(100));
        assert_eq!(int("100.0"), Ok(100));
        assert_eq!(int("-9223372036854775808"), Ok(i64::MIN));
        assert_eq!(int("1.5").unwrap_err(), "n must be an integer of 64 bits, got 1.5.");
        assert_eq!(int("\"1\"").unwrap_err(), "n must be an integer, got a string.");
        assert_eq!(int("true").unwrap_err(), "n must be an integer, got a boolean.");
        assert!(int("1e400").is_err());
        assert!(int("9223372036854775808").is_err());
    }

    #[test]
    fn of_equal_keys_the_last_counts() {
        let raw = document(br#"{"a":1,"b":2,"a":3,"c":null}"#).unwrap();
        let object = Field::root(raw).object(&["a", "c"]).unwrap();
        assert_eq!(object.int("a").unwrap(), Some(3));
        assert!(object.field("c").is_none());
    }

    #[test]
    fn arrays_are_counted() {
        let raw = document(b"[1,2,3]").unwrap();
        assert!(Field::root(raw).array(3).is_ok());
        assert!(Field::root(raw).array(2).is_err());
    }

    #[test]
    fn entries_are_counted_with_equal_keys() {
        let entries = |text: &str, max| {
            let raw = document(text.as_bytes()).unwrap();
            let entries = Field { path: "o".to_owned(), raw }.entries(max).map_err(|e| e.to_string())?;
            Ok(entries.into_iter().map(|(key, value)| format!("{key} {}", value.text())).collect::<Vec<_>>())
        };
        let text = r#"{"a":1,"b":2,"a":3}"#;
        assert_eq!(entries(text, 3), Ok(vec!["a 3".to_owned(), "b 2".to_owned()]));
        assert_eq!(entries(text, 2), Err("o has more than 2 entries.".to_owned()));
        let broken = entries(r#"{"\ud800":1}"#, 2).unwrap_err();
        assert!(broken.starts_with("o is not valid: "), "{broken}");
    }

    #[test]
    fn ids_are_integers_like_others() {
        let ids = |text: &str| {
            let raw = document(text.as_bytes()).unwrap();
            Field { path: "ids".to_owned(), raw }.ids().map_err(|e| e.to_string())
        };
        assert_eq!(ids("[]"), Ok(vec![]));
        assert_eq!(ids("[7, 1e1, 2.0, 4294967295, -0.0]"), Ok(vec![7, 10, 2, u32::MAX, 0]));
        for bad in ["[1.5]", "[-1]", "[-1.0]", "[4294967296]", "[1e10]", "[true]", "[null]", "[[1]]"] {
            assert_eq!(ids(bad), Err("ids must hold token ids, integers from 0.".to_owned()), "{bad}");
        }
    }
}
