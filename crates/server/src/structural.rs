//! Structural tags, in the two forms that clients send: a list of `structures` with `triggers`, or a `format` that nests.

use engine::{Form, Structure, Tag, Whitespace};

use crate::error::ApiError;
use crate::form;
use crate::json::{Field, Object, excerpt};

/// Of one list; the engine bounds their sum.
const MAX_ITEMS: usize = 1000;

/// The fields that either form has.
pub(crate) const FIELDS: [&str; 4] = ["type", "structures", "triggers", "format"];

/// Reads either form from an object whose type says that it is one.
pub(crate) fn read(object: &Object<'_>) -> Result<Structure, ApiError> {
    if let Some(format) = object.field("format") {
        return structure(&format);
    }
    let tags = object.required("structures")?.array(MAX_ITEMS)?;
    let tag = |tag: &Field<'_>| {
        let tag = tag.object(&["begin", "schema", "end"])?;
        Ok(Tag {
            begin: tag.required("begin")?.string()?,
            content: schema(&tag.required("schema")?)?,
            end: tag.required("end")?.string()?,
        })
    };
    Ok(Structure::Triggered {
        triggers: strings(&object.required("triggers")?)?,
        tags: tags.iter().map(tag).collect::<Result<_, ApiError>>()?,
        at_least_one: false,
        stop_after_first: false,
    })
}

fn structure(field: &Field<'_>) -> Result<Structure, ApiError> {
    let object = field.object(&[
        "type",
        "value",
        "json_schema",
        "pattern",
        "grammar",
        "elements",
        "begin",
        "content",
        "end",
        "triggers",
        "tags",
        "separator",
        "at_least_one",
        "stop_after_first",
    ])?;
    let kind = object.required("type")?;
    let list = |name| object.required(name)?.array(MAX_ITEMS);
    let all = |name| list(name)?.iter().map(structure).collect::<Result<Vec<_>, ApiError>>();
    let tags = || list("tags")?.iter().map(tag).collect::<Result<Vec<_>, ApiError>>();
    let flag = |name| Ok::<_, ApiError>(object.bool(name)?.unwrap_or(false));
    Ok(match kind.string()?.as_str() {
        "const_string" => Structure::Const(object.required("value")?.string()?),
        "any_text" => Structure::Any,
        "json_schema" => schema(&object.required("json_schema")?)?,
        "regex" => Structure::Form(Box::new(Form::Regex(object.required("pattern")?.string()?))),
        "grammar" => {
            let grammar = object.required("grammar")?.string()?;
            Structure::Form(Box::new(form::grammar_form(grammar)))
        }
        "sequence" => Structure::Sequence(all("elements")?),
        "or" => Structure::Or(all("elements")?),
        "tag" => Structure::Tag(Box::new(tag(field)?)),
        "triggered_tags" => Structure::Triggered {
            triggers: strings(&object.required("triggers")?)?,
            tags: tags()?,
            at_least_one: flag("at_least_one")?,
            stop_after_first: flag("stop_after_first")?,
        },
        "tags_with_separator" => Structure::Separated {
            tags: tags()?,
            separator: object.required("separator")?.string()?,
            at_least_one: flag("at_least_one")?,
            stop_after_first: flag("stop_after_first")?,
        },
        other => {
            let message = format!(
                "{} must be one of const_string, any_text, json_schema, regex, grammar, sequence, or, tag, triggered_tags, \
                 tags_with_separator, got {}.",
                kind.path(),
                excerpt(other)
            );
            return Err(kind.error(message));
        }
    })
}

fn tag(field: &Field<'_>) -> Result<Tag, ApiError> {
    let object = field.object(&["begin", "content", "end"])?;
    Ok(Tag {
        begin: object.required("begin")?.string()?,
        content: structure(&object.required("content")?)?,
        end: object.required("end")?.string()?,
    })
}

fn schema(field: &Field<'_>) -> Result<Structure, ApiError> {
    let schema = form::schema_value(field)?;
    Ok(Structure::Form(Box::new(Form::Json { schema, lenient: false, whitespace: Whitespace::default() })))
}

fn strings(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    field.array(MAX_ITEMS)?.iter().map(Field::string).collect()
}
