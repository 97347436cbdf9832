//! Structural tags: texts in which what stands between given marks has a form, while the rest is free or has another. Their names
//! are those of xgrammar's structural tags, which vLLM takes.

use std::fmt::Write;

use llguidance::api::GrammarWithLexer;

use crate::grammar::{self, Form, quote};

/// What a text, or a part of it, must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Structure {
    /// Exactly this text.
    Const(String),
    /// Anything; only as all of a text, its end, or the content of a tag.
    Any,
    /// A form of its own.
    Form(Box<Form>),
    /// One after the other.
    Sequence(Vec<Structure>),
    /// One of these.
    Or(Vec<Structure>),
    /// A content between two marks.
    Tag(Box<Tag>),
    /// A free text; but wherever one of `triggers` comes, a tag that begins with it must follow.
    Triggered {
        /// Where a tag begins.
        triggers: Vec<String>,
        /// Each begins with a trigger.
        tags: Vec<Tag>,
        /// There must be a tag.
        at_least_one: bool,
        /// Nothing comes after the first tag.
        stop_after_first: bool,
    },
    /// Tags and nothing else.
    Separated {
        /// Any of these.
        tags: Vec<Tag>,
        /// What stands between two of them.
        separator: String,
        /// There must be a tag.
        at_least_one: bool,
        /// There is at most one.
        stop_after_first: bool,
    },
}

/// A content between two marks.
#[derive(Debug, Clone, PartialEq)]
pub struct Tag {
    /// What comes before.
    pub begin: String,
    /// What comes between.
    pub content: Structure,
    /// What comes after.
    pub end: String,
}

/// Most parts of a structure, their deepest nesting, and the bytes of text and of schemas that the grammars may have.
const MAX_PARTS: usize = 1000;
const MAX_DEPTH: usize = 32;
const MAX_BYTES: usize = 4 * grammar::MAX_FORM_BYTES;

/// The grammar of a structure under this name, and those that it is made of.
///
/// # Errors
/// A sentence's rest that says what is wrong.
pub(crate) fn grammars(name: &str, structure: &Structure) -> Result<Vec<GrammarWithLexer>, String> {
    let mut builder = Builder { name, rules: String::new(), parts: Vec::new(), count: 0, bytes: 0 };
    let start = builder.expression(structure, true, 0)?;
    let mut grammars = vec![grammar::lark(name, format!("start: {start}\n{}", builder.rules))];
    grammars.append(&mut builder.parts);
    Ok(grammars)
}

struct Builder<'a> {
    name: &'a str,
    rules: String,
    parts: Vec<GrammarWithLexer>,
    count: usize,
    bytes: usize,
}

impl Builder<'_> {
    /// An expression for the structure. `last`: nothing comes after it.
    fn expression(&mut self, structure: &Structure, last: bool, depth: usize) -> Result<String, String> {
        let number = self.next(depth)?;
        Ok(match structure {
            Structure::Const(text) => self.counted(quote(text))?,
            Structure::Any if last => "/(?s:.*)/".to_owned(),
            Structure::Any => {
                return Err("any_text must be the last of a text, or the content of a tag".to_owned());
            }
            Structure::Form(form) => {
                grammar::check(form)?;
                let part = format!("{}_{number}", self.name);
                for part in grammar::of_form(&part, form) {
                    self.count_bytes(grammar::bytes(&part))?;
                    self.parts.push(part);
                }
                format!("@{part}")
            }
            Structure::Sequence(all) => {
                let count = all.len();
                let each = all.iter().enumerate();
                let each = each.map(|(i, one)| self.expression(one, last && i + 1 == count, depth + 1));
                let all = each.collect::<Result<Vec<_>, _>>()?;
                if all.is_empty() { quote("") } else { format!("({})", all.join(" ")) }
            }
            Structure::Or(all) => {
                let each = all.iter().map(|one| self.expression(one, last, depth + 1));
                alternatives(&each.collect::<Result<Vec<_>, _>>()?)?
            }
            Structure::Tag(tag) => self.tag(tag, &tag.begin, depth)?,
            Structure::Separated { tags, separator, at_least_one, stop_after_first } => {
                let each = tags.iter().map(|tag| self.tag(tag, &tag.begin, depth));
                let any = alternatives(&each.collect::<Result<Vec<_>, _>>()?)?;
                // A rule of its own: it is named twice, and what it consists of may be such tags again.
                let tag = format!("tag{number}");
                let _ = writeln!(self.rules, "{tag}: {any}");
                let more = match stop_after_first {
                    true => String::new(),
                    false => format!(" ({} {tag})*", self.counted(quote(separator))?),
                };
                let optional = if *at_least_one { "" } else { "?" };
                format!("({tag}{more}){optional}")
            }
            Structure::Triggered { .. } if !last => {
                return Err(
                    "triggered_tags must be the last of a text, or the content of a tag without an end"
                        .to_owned(),
                );
            }
            Structure::Triggered { triggers, tags, at_least_one, stop_after_first } => {
                let tags = self.triggered(number, triggers, tags, depth)?;
                // Text without a trigger; the end of what comes is the end of the text.
                let any = self.counted(regexes(triggers))?;
                let free = format!("/(?s:.*)/ & ~/(?s:.*)({any})(?s:.*)/");
                let _ = writeln!(self.rules, "FREE{number}: {free}");
                match (at_least_one, stop_after_first) {
                    (true, true) => tags,
                    (false, true) => format!("({tags} | FREE{number})"),
                    (true, false) => format!("({tags}+ FREE{number})"),
                    (false, false) => format!("({tags}* FREE{number})"),
                }
            }
        })
    }

    /// Free text up to a trigger, and the rest of a tag that begins with it.
    fn triggered(
        &mut self,
        number: usize,
        triggers: &[String],
        tags: &[Tag],
        depth: usize,
    ) -> Result<String, String> {
        if triggers.is_empty() || triggers.iter().any(String::is_empty) {
            return Err("there must be triggers, none of them empty".to_owned());
        }
        let stray = tags.iter().find(|tag| triggers.iter().all(|trigger| !tag.begin.starts_with(&**trigger)));
        if let Some(tag) = stray {
            return Err(format!(
                "the tag {:?} begins with no trigger",
                tag.begin.chars().take(40).collect::<String>()
            ));
        }
        let mut all = Vec::new();
        for (i, trigger) in triggers.iter().enumerate() {
            let mut rests = Vec::new();
            for tag in tags {
                if let Some(rest) = tag.begin.strip_prefix(&**trigger) {
                    rests.push(self.tag(tag, rest, depth)?);
                }
            }
            if rests.is_empty() {
                continue;
            }
            let until = format!("until{number}_{i}");
            let trigger = self.counted(regex(trigger))?;
            let _ = writeln!(self.rules, "{until}[lazy]: /(?s:.*){trigger}/");
            all.push(format!("{until} {}", alternatives(&rests)?));
        }
        alternatives(&all)
    }

    /// A tag of which so much of the beginning is still to come.
    fn tag(&mut self, tag: &Tag, begin: &str, depth: usize) -> Result<String, String> {
        let begin = if begin.is_empty() { String::new() } else { self.counted(quote(begin))? + " " };
        if matches!(tag.content, Structure::Any) && !tag.end.is_empty() {
            let number = self.next(depth)?;
            let end = self.counted(regex(&tag.end))?;
            let _ = writeln!(self.rules, "content{number}[lazy]: /(?s:.*){end}/");
            return Ok(format!("{begin}content{number}"));
        }
        let content = self.expression(&tag.content, false, depth + 1)?;
        let end =
            if tag.end.is_empty() { String::new() } else { format!(" {}", self.counted(quote(&tag.end))?) };
        Ok(format!("{begin}{content}{end}"))
    }

    /// A text that goes into the grammars. What comes several times counts each time, before more is made of it.
    fn counted(&mut self, text: String) -> Result<String, String> {
        self.count_bytes(text.len())?;
        Ok(text)
    }

    fn count_bytes(&mut self, bytes: usize) -> Result<(), String> {
        self.bytes += bytes;
        match self.bytes {
            ..=MAX_BYTES => Ok(()),
            _ => Err(format!("it must have at most {MAX_BYTES} bytes of grammar")),
        }
    }

    fn next(&mut self, depth: usize) -> Result<usize, String> {
        self.count += 1;
        match (self.count, depth) {
            (..=MAX_PARTS, ..=MAX_DEPTH) => Ok(self.count),
            _ => Err(format!("it must have at most {MAX_PARTS} parts and {MAX_DEPTH} levels")),
        }
    }
}

fn alternatives(all: &[String]) -> Result<String, String> {
    match all {
        [] => Err("there must be something to choose from".to_owned()),
        all => Ok(format!("({})", all.join(" | "))),
    }
}

/// What matches any of these texts and nothing else.
fn regexes(texts: &[String]) -> String {
    texts.iter().map(|text| regex(text)).collect::<Vec<_>>().join("|")
}

fn regex(text: &str) -> String {
    text.chars().map(|c| format!("\\x{{{:x}}}", u32::from(c))).collect()
}
