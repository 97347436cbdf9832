//! `response_format` and `structured_outputs`: what an answer must look like (`serving.md` 9.1, 9.2).

use engine::{Form, GrammarError, Whitespace};
use harmony::ResponseFormat;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::json::{self, Field, Object, excerpt};
use crate::structural;

/// Of a schema or grammar as text; the engine has limits of its own below.
const MAX_BYTES: usize = 256 << 10;
const MAX_CHOICES: usize = 10_000;
const MAX_NAME: usize = 64;

/// What a client wants an answer to look like.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) form: Form,
    /// What the model is told of it.
    pub(crate) shown: Option<ResponseFormat>,
    /// The field to complain about.
    pub(crate) param: String,
}

/// What JSON must keep to beside its schema; that in structural tags has its schemas alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JsonRules {
    /// There is nothing between its tokens.
    pub no_whitespace: bool,
    /// Objects whose properties the schema names have no others, unless it says that they may, or several of its parts describe one
    /// object together.
    pub no_other_properties: bool,
}

impl JsonRules {
    pub(crate) fn apply(self, mut form: Form) -> Form {
        if let Form::Json { schema, whitespace, .. } = &mut form {
            if self.no_whitespace {
                *whitespace = Whitespace::None;
            }
            if self.no_other_properties && !combines(schema) {
                close(schema);
            }
        }
        form
    }
}

/// What either field says; both cannot.
pub(crate) fn read(object: &Object<'_>) -> Result<Option<Wanted>, ApiError> {
    let format = object.field("response_format").map(|field| response_format(&field)).transpose()?.flatten();
    let outputs = object.field("structured_outputs").map(|field| structured_outputs(&field)).transpose()?;
    match (format, outputs) {
        (Some(_), Some(_)) => {
            let message = "structured_outputs cannot be used together with response_format.";
            Err(ApiError::invalid("structured_outputs", message))
        }
        (format, outputs) => Ok(format.or(outputs)),
    }
}

/// A client is told which of its fields cannot be compiled.
pub(crate) fn refusal(error: &GrammarError, answer: &str, calls: &[String]) -> ApiError {
    let param = match error {
        GrammarError::Busy => return ApiError::Busy { seconds: 1 },
        GrammarError::Answer(_) => answer,
        GrammarError::Call { index, .. } => calls.get(*index).map_or(answer, String::as_str),
    };
    ApiError::invalid(param, format!("{param} cannot be used: {error}."))
}

/// `{"type": "json_schema", …}` and its siblings; `None` for plain text.
fn response_format(field: &Field<'_>) -> Result<Option<Wanted>, ApiError> {
    let object = field.object(&[
        "type",
        "json_schema",
        "schema",
        "pattern",
        "grammar",
        "syntax",
        "structures",
        "triggers",
        "format",
    ])?;
    let kind = object.required("type")?;
    let kind_name = kind.string()?;
    Ok(Some(match kind_name.as_str() {
        "text" => return Ok(None),
        "json_object" => json_object(&object, field.path())?,
        "json_schema" => {
            let object =
                object.required("json_schema")?.object(&["name", "description", "schema", "strict"])?;
            json_schema(&object)?
        }
        "regex" => text_form(&object.required("pattern")?, Form::Regex)?,
        "grammar" => {
            let field = object.required("grammar")?;
            match object.field("syntax") {
                None => grammar(&field)?,
                Some(syntax) => match syntax.string()?.as_str() {
                    "lark" => text_form(&field, Form::Lark)?,
                    "gbnf" | "ebnf" => text_form(&field, Form::Gbnf)?,
                    other => {
                        let message =
                            format!("{} must be lark, gbnf or ebnf, got {}.", syntax.path(), excerpt(other));
                        return Err(syntax.error(message));
                    }
                },
            }
        }
        "structural_tag" => structural_tag(&object, field.path())?,
        other => {
            let message = format!(
                "{} must be one of text, json_object, json_schema, regex, grammar, structural_tag, got {}.",
                kind.path(),
                excerpt(other)
            );
            return Err(kind.error(message));
        }
    }))
}

/// `name`, `description`, `schema` and `strict`, wherever they stand.
pub(crate) fn json_schema(object: &Object<'_>) -> Result<Wanted, ApiError> {
    let name = object.required("name")?;
    let name_text = name.string()?;
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name_text.is_empty() || name_text.len() > MAX_NAME || !name_text.chars().all(letters) {
        let message = format!("{} must be 1 to {MAX_NAME} letters, digits, `_` or `-`.", name.path());
        return Err(name.error(message));
    }
    let schema = object.required("schema")?;
    let value = schema_value(&schema)?;
    let shown =
        ResponseFormat { name: name_text, description: object.string("description")?, schema: value.clone() };
    // Without a word from the client nothing is silently left out.
    let lenient = object.bool("strict")? == Some(false);
    let form = Form::Json { schema: value, lenient, whitespace: Whitespace::default() };
    Ok(Wanted { form, shown: Some(shown), param: schema.path().to_owned() })
}

/// A JSON object: any, or in the dialect of llama.cpp one of a `schema`.
pub(crate) fn json_object(object: &Object<'_>, param: &str) -> Result<Wanted, ApiError> {
    let schema = object.field("schema").map(|field| schema_value(&field)).transpose()?;
    let shown =
        schema.clone().map(|schema| ResponseFormat { name: "answer".to_owned(), description: None, schema });
    let schema = schema.unwrap_or_else(|| json!({"type": "object"}));
    let form = Form::Json { schema, lenient: false, whitespace: Whitespace::default() };
    Ok(Wanted { form, shown, param: param.to_owned() })
}

/// vLLM's: exactly one constraint, and options.
fn structured_outputs(field: &Field<'_>) -> Result<Wanted, ApiError> {
    const KINDS: [&str; 6] = ["json", "regex", "choice", "grammar", "json_object", "structural_tag"];
    let object = field.object(&[
        "json",
        "regex",
        "choice",
        "grammar",
        "json_object",
        "structural_tag",
        "disable_any_whitespace",
        "disable_additional_properties",
        "whitespace_pattern",
    ])?;
    let given: Vec<Field<'_>> = KINDS.into_iter().filter_map(|kind| object.field(kind)).collect();
    let [only] = &given[..] else {
        let message =
            "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice').";
        return Err(field.error(message));
    };
    let rules = JsonRules {
        no_whitespace: object.bool("disable_any_whitespace")? == Some(true),
        no_other_properties: object.bool("disable_additional_properties")? == Some(true),
    };
    let pattern = object.string("whitespace_pattern")?;
    let json = |schema| {
        let whitespace = pattern.map_or_else(Whitespace::default, Whitespace::Pattern);
        rules.apply(Form::Json { schema, lenient: false, whitespace })
    };
    let kind = KINDS.into_iter().find(|kind| object.field(kind).is_some());
    match kind {
        Some("json") => {
            let schema = if only.is_string() {
                let text = only.string()?;
                schema_value(&Field::at(only.path(), document(&text, only)?))?
            } else {
                schema_value(only)?
            };
            let shown =
                ResponseFormat { name: "answer".to_owned(), description: None, schema: schema.clone() };
            Ok(Wanted { form: json(schema), shown: Some(shown), param: only.path().to_owned() })
        }
        Some("json_object") if !only.bool()? => Err(only.error(format!("{} must be true.", only.path()))),
        Some("json_object") => {
            let form = json(json!({"type": "object"}));
            Ok(Wanted { form, shown: None, param: only.path().to_owned() })
        }
        Some("regex") => text_form(only, Form::Regex),
        Some("choice") => {
            let choices = only.array(MAX_CHOICES)?;
            let choices = choices.iter().map(Field::string).collect::<Result<_, _>>()?;
            Ok(Wanted { form: Form::Choice(choices), shown: None, param: only.path().to_owned() })
        }
        Some("grammar") => grammar(only),
        // The last of them: an object, written as a string.
        _ => {
            let text = only.string()?;
            let object = Field::at(only.path(), document(&text, only)?).object(&structural::FIELDS)?;
            structural_tag(&object, only.path())
        }
    }
}

/// JSON that a field has as a string.
fn document<'a>(text: &'a str, field: &Field<'_>) -> Result<&'a RawValue, ApiError> {
    json::document(text.as_bytes()).map_err(|_| field.error(format!("{} is not valid JSON.", field.path())))
}

fn names_properties(keywords: &Map<String, Value>) -> bool {
    ["properties", "patternProperties"].iter().any(|&name| keywords.contains_key(name))
}

/// Whether several parts of a schema may describe one object together, so that none of them says all that it may have.
fn combines(schema: &Value) -> bool {
    match schema {
        Value::Object(keywords) => {
            let named = names_properties(keywords);
            keywords.iter().any(|(keyword, value)| match (keyword.as_str(), value) {
                ("allOf" | "not" | "if" | "dependentSchemas", _) => true,
                ("anyOf" | "oneOf" | "$ref", _) if named => true,
                ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(named)) => {
                    named.values().any(combines)
                }
                ("enum" | "const" | "default" | "examples", _) => false,
                (_, value) => combines(value),
            })
        }
        Value::Array(schemas) => schemas.iter().any(combines),
        _ => false,
    }
}

/// Forbids other properties where a schema names some and says nothing of others.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(keywords) => {
            for (keyword, value) in keywords.iter_mut() {
                match (keyword.as_str(), value) {
                    ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(named)) => {
                        named.values_mut().for_each(close);
                    }
                    ("enum" | "const" | "default" | "examples", _) => {}
                    (_, value) => close(value),
                }
            }
            if names_properties(keywords) && !keywords.contains_key("additionalProperties") {
                keywords.insert("additionalProperties".to_owned(), false.into());
            }
        }
        Value::Array(schemas) => schemas.iter_mut().for_each(close),
        _ => {}
    }
}

fn structural_tag(object: &Object<'_>, param: &str) -> Result<Wanted, ApiError> {
    let form = Form::Structure(structural::read(object)?);
    Ok(Wanted { form, shown: None, param: param.to_owned() })
}

fn grammar(field: &Field<'_>) -> Result<Wanted, ApiError> {
    text_form(field, grammar_form)
}

/// A grammar in the notation that shows in what defines a rule.
pub(crate) fn grammar_form(text: String) -> Form {
    if text.contains("::=") { Form::Gbnf(text) } else { Form::Lark(text) }
}

fn text_form(field: &Field<'_>, form: impl FnOnce(String) -> Form) -> Result<Wanted, ApiError> {
    Ok(Wanted { form: form(field.string()?), shown: None, param: field.path().to_owned() })
}

pub(crate) fn schema_value(field: &Field<'_>) -> Result<Value, ApiError> {
    if !field.is_object() {
        return Err(field.error(format!("{} must be an object.", field.path())));
    }
    field.value(MAX_BYTES)
}
