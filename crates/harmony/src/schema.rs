//! Tools as the TypeScript that the model was trained on. Its odd indentation is part of the format.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;

use serde_json::{Map, Value};

use crate::message::ToolNamespace;

/// The `# Tools` block.
pub(crate) fn tools_block(namespaces: &BTreeMap<String, ToolNamespace>) -> String {
    let mut sections = vec!["# Tools".to_owned()];
    for namespace in namespaces.values() {
        let mut lines = vec![format!("## {}\n", namespace.name)];
        let comment = if namespace.tools.is_empty() { "" } else { "// " };
        let description = namespace.description.as_deref().unwrap_or_default();
        lines.extend(description.lines().map(|line| format!("{comment}{line}")));
        if !namespace.tools.is_empty() {
            lines.push(format!("namespace {} {{\n", namespace.name));
            for tool in &namespace.tools {
                lines.extend(tool.description.lines().map(|line| format!("// {line}")));
                lines.push(match &tool.parameters {
                    Some(schema) => format!("type {} = (_: {}) => any;\n", tool.name, type_of(schema, "")),
                    None => format!("type {} = () => any;\n", tool.name),
                });
            }
            lines.push(format!("}} // namespace {}", namespace.name));
        }
        sections.push(lines.join("\n"));
    }
    sections.join("\n\n")
}

/// The type of a schema, inside text that is indented by `indent`.
fn type_of(schema: &Value, indent: &str) -> String {
    if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
        let inner = format!("{indent}   ");
        let mut out = String::new();
        for variant in variants {
            let mut remarks = Vec::new();
            remarks.extend(text(variant, "description").map(str::to_owned));
            remarks.extend(variant.get("default").map(|d| format!("default: {}", literal(d, true))));
            let _ = write!(
                out,
                "\n{indent} | {}{}",
                nullable(variant, type_of(variant, &inner)),
                trailing(&remarks)
            );
        }
        return out;
    }
    match schema.get("type") {
        Some(Value::Array(types)) if !types.is_empty() => {
            let names =
                types.iter().filter_map(Value::as_str).map(|t| if t == "integer" { "number" } else { t });
            names.collect::<Vec<_>>().join(" | ")
        }
        Some(Value::String(kind)) => match kind.as_str() {
            "object" => object(schema, indent),
            "string" => match non_empty_enum(schema) {
                Some(members) => {
                    let quoted = members.iter().filter_map(Value::as_str).map(|m| format!("\"{m}\""));
                    quoted.collect::<Vec<_>>().join(" | ")
                }
                None => "string".to_owned(),
            },
            "number" | "integer" => "number".to_owned(),
            "boolean" => "boolean".to_owned(),
            "array" => match schema.get("items") {
                Some(items) => format!("{}[]", type_of(items, indent)),
                None => "Array<any>".to_owned(),
            },
            _ => "any".to_owned(),
        },
        _ => "any".to_owned(),
    }
}

fn object(schema: &Value, indent: &str) -> String {
    let mut out = String::new();
    if let Some(description) = text(schema, "description") {
        let _ = writeln!(out, "{indent}// {description}");
    }
    out.push_str("{\n");
    let none = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required: HashSet<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    for (name, property) in properties {
        let mark = if required.contains(name.as_str()) { "" } else { "?" };
        write_property(&mut out, &format!("{name}{mark}"), property, indent);
    }
    let _ = write!(out, "{indent}}}");
    out
}

fn write_property(out: &mut String, name: &str, property: &Value, indent: &str) {
    if let Some(title) = text(property, "title") {
        let _ = writeln!(out, "{indent}// {title}\n{indent}//");
    }
    let variants = property.get("oneOf").and_then(Value::as_array);
    let description = text(property, "description");
    // A description that the first variant repeats is left to neither.
    let first = variants.and_then(|v| v.first()).and_then(|v| text(v, "description"));
    let printed = description.filter(|d| variants.is_none() || Some(*d) != first);
    if let Some(description) = printed {
        let _ = writeln!(out, "{indent}// {description}");
    }
    if let Some(examples) = property.get("examples").and_then(Value::as_array).filter(|e| !e.is_empty()) {
        let _ = writeln!(out, "{indent}// Examples:");
        for example in examples.iter().filter_map(Value::as_str) {
            let _ = writeln!(out, "{indent}// - \"{example}\"");
        }
    }
    let default = property.get("default");
    let Some(variants) = variants else {
        let inner = format!("{indent}    ");
        let _ = write!(out, "{indent}{name}: {},", nullable(property, type_of(property, &inner)));
        if let Some(default) = default {
            let _ = write!(out, " // default: {}", literal(default, non_empty_enum(property).is_none()));
        }
        out.push('\n');
        return;
    };
    if let Some(default) = default {
        let _ = writeln!(out, "{indent}// default: {}", literal(default, non_empty_enum(property).is_none()));
    }
    let _ = writeln!(out, "{indent}{name}:");
    for (i, variant) in variants.iter().enumerate() {
        let own = text(variant, "description")
            .filter(|own| !(i == 0 && printed.is_some()) && Some(*own) != description);
        let mut remarks: Vec<String> = own.map(str::to_owned).into_iter().collect();
        remarks.extend(
            variant
                .get("default")
                .map(|d| format!("default: {}", literal(d, non_empty_enum(variant).is_none()))),
        );
        let kind = nullable(variant, type_of(variant, &format!("{indent}   ")));
        let _ = writeln!(out, "{indent} | {kind}{}", trailing(&remarks));
    }
    let _ = writeln!(out, "{indent},");
}

fn nullable(schema: &Value, kind: String) -> String {
    if schema.get("nullable") == Some(&Value::Bool(true)) && !kind.contains("null") {
        kind + " | null"
    } else {
        kind
    }
}

fn trailing(remarks: &[String]) -> String {
    if remarks.is_empty() { String::new() } else { format!(" // {}", remarks.join(" ")) }
}

/// A default: a string in quotes, without escaping, or bare; anything else as compact JSON.
fn literal(value: &Value, quoted: bool) -> String {
    match value {
        Value::String(text) if quoted => format!("\"{text}\""),
        Value::String(text) => text.clone(),
        other => compact(other),
    }
}

/// Compact JSON with exponents in Rust's form, 1e21, where serde_json writes 1e+21.
fn compact(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string().replace("e+", "e"),
        Value::Array(items) => format!("[{}]", items.iter().map(compact).collect::<Vec<_>>().join(",")),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(k, v)| format!("{}:{}", Value::from(k.as_str()), compact(v)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
        }
        other => other.to_string(),
    }
}

fn text<'v>(schema: &'v Value, key: &str) -> Option<&'v str> {
    schema.get(key).and_then(Value::as_str)
}

fn non_empty_enum(schema: &Value) -> Option<&Vec<Value>> {
    schema.get("enum").and_then(Value::as_array).filter(|members| !members.is_empty())
}
