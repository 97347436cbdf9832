//! Grammars in llama.cpp's notation (GBNF, which other servers call EBNF) as grammars in Lark's.
//!
//! A grammar of characters: the compiler behind takes the longest word that a literal or class could be, and does not go back, so
//! every character becomes a word of its own.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

/// Deepest nesting of groups.
const MAX_DEPTH: usize = 64;
/// Most times that something may be asked for.
const MAX_TIMES: u32 = 10_000;

/// The same language in Lark's notation, from the rule `root`.
///
/// # Errors
/// A sentence's rest that says what is wrong and where.
pub(crate) fn to_lark(text: &str) -> Result<String, String> {
    let mut reader = Reader { rest: text, text };
    let mut rules: Vec<(String, String)> = Vec::new();
    let mut known: HashSet<String> = HashSet::new();
    // Names as they are may be no names in Lark.
    let mut numbers: HashMap<String, usize> = HashMap::new();
    let mut number = |name: &str| {
        let next = numbers.len();
        *numbers.entry(name.to_owned()).or_insert(next)
    };
    reader.skip();
    while !reader.rest.is_empty() {
        let Some(name) = reader.name() else { return Err(reader.unexpected("a rule's name")) };
        reader.skip();
        if !reader.take("::=") {
            return Err(reader.unexpected("::="));
        }
        reader.skip();
        let mut body = String::new();
        reader.alternatives(&mut body, &mut number, 0)?;
        if !known.insert(name.clone()) {
            return Err(format!("the rule {name} is there twice"));
        }
        rules.push((name, body));
    }
    if !known.contains("root") {
        return Err("there must be a rule root".to_owned());
    }
    let mut lark = format!("start: r{}\n", number("root"));
    for (name, body) in &rules {
        let _ = writeln!(lark, "r{}: {body}", number(name));
    }
    match numbers.keys().find(|used| !known.contains(*used)) {
        Some(unknown) => Err(format!("there is no rule {unknown}")),
        None => Ok(lark),
    }
}

struct Reader<'a> {
    rest: &'a str,
    text: &'a str,
}

impl<'a> Reader<'a> {
    /// Sequences between bars, up to a bracket that was opened before or the next rule.
    fn alternatives(
        &mut self,
        out: &mut String,
        number: &mut impl FnMut(&str) -> usize,
        depth: usize,
    ) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("it must have at most {MAX_DEPTH} levels of brackets"));
        }
        let mut some = String::new();
        let mut nothing = false;
        loop {
            let before = some.len();
            if before > 0 {
                some += " | ";
            }
            if !self.sequence(&mut some, number, depth)? {
                some.truncate(before);
                nothing = true;
            }
            if !self.take("|") {
                break;
            }
            self.skip();
        }
        match (some.is_empty(), nothing) {
            (true, _) => out.push_str("\"\""),
            (false, true) => drop(write!(out, "({some})?")),
            (false, false) => out.push_str(&some),
        }
        Ok(())
    }

    /// Items one after the other; false if there are none.
    fn sequence(
        &mut self,
        out: &mut String,
        number: &mut impl FnMut(&str) -> usize,
        depth: usize,
    ) -> Result<bool, String> {
        let begin = out.len();
        loop {
            let mut item = String::new();
            match self.rest.chars().next() {
                Some('"') => self.literal(&mut item)?,
                Some('[') => self.class(&mut item)?,
                Some('.') => {
                    self.take(".");
                    item += "/(?s:.)/";
                }
                Some('(') => {
                    self.take("(");
                    self.skip();
                    item.push('(');
                    self.alternatives(&mut item, number, depth + 1)?;
                    item.push(')');
                    if !self.take(")") {
                        return Err(self.unexpected("`)`"));
                    }
                }
                Some(c) if is_name(c) && !self.begins_rule() => {
                    let name = self.name().unwrap_or_default();
                    let _ = write!(item, "r{}", number(&name));
                }
                _ => return Ok(out.len() > begin),
            }
            self.skip();
            self.times(&mut item)?;
            if !item.is_empty() {
                if out.len() > begin {
                    out.push(' ');
                }
                *out += &item;
            }
        }
    }

    /// `*`, `+`, `?` or `{m,n}` after an item.
    fn times(&mut self, item: &mut String) -> Result<(), String> {
        let mut levels = 0;
        while let Some(c) = self.rest.chars().next() {
            if levels > MAX_DEPTH {
                return Err(format!("it must have at most {MAX_DEPTH} repetitions of repetitions"));
            }
            levels += 1;
            match c {
                '*' | '+' | '?' => {
                    self.rest = &self.rest[1..];
                    *item = match item.is_empty() {
                        true => String::new(),
                        false => format!("({item}){c}"),
                    };
                }
                '{' => {
                    self.rest = &self.rest[1..];
                    self.skip();
                    let least = self.count()?.ok_or_else(|| self.unexpected("a number"))?;
                    self.skip();
                    let most = match self.take(",") {
                        true => {
                            self.skip();
                            self.count()?
                        }
                        false => Some(least),
                    };
                    self.skip();
                    if !self.take("}") {
                        return Err(self.unexpected("`}`"));
                    }
                    if most.is_some_and(|most| most < least) {
                        return Err(format!("{{{least},{}}} asks for nothing", most.unwrap_or_default()));
                    }
                    *item = match (item.is_empty(), most) {
                        (true, _) | (false, Some(0)) => String::new(),
                        (false, Some(most)) => format!("({item}){{{least},{most}}}"),
                        (false, None) => format!("({item}){{{least},}}"),
                    };
                }
                _ => break,
            }
            self.skip();
        }
        Ok(())
    }

    fn count(&mut self) -> Result<Option<u32>, String> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        if digits.is_empty() {
            return Ok(None);
        }
        match digits.parse() {
            Ok(count) if count <= MAX_TIMES => Ok(Some(count)),
            _ => Err(format!("at most {MAX_TIMES} repetitions may be asked for")),
        }
    }

    /// A literal, character by character.
    fn literal(&mut self, out: &mut String) -> Result<(), String> {
        self.take("\"");
        let mut count = 0;
        while !self.take("\"") {
            let c = self.character("`\"`")?;
            let space = if count > 0 { " " } else { "" };
            let _ = write!(out, "{space}{}", word(&format!("\\x{{{:x}}}", u32::from(c))));
            count += 1;
        }
        if count > 1 {
            *out = format!("({out})");
        }
        Ok(())
    }

    /// A class of characters.
    fn class(&mut self, out: &mut String) -> Result<(), String> {
        self.take("[");
        let not = if self.take("^") { "^" } else { "" };
        let mut ranges = String::new();
        while !self.take("]") {
            let first = self.character("`]`")?;
            let last = match self.rest.strip_prefix('-') {
                Some(rest) if !rest.starts_with(']') => {
                    self.rest = rest;
                    self.character("`]`")?
                }
                _ => first,
            };
            if last < first {
                return Err(format!("the range from {first:?} to {last:?} is empty"));
            }
            let _ = write!(ranges, "\\x{{{:x}}}-\\x{{{:x}}}", u32::from(first), u32::from(last));
        }
        match ranges.is_empty() {
            // `[^]` is anything.
            true if !not.is_empty() => *out += "/(?s:.)/",
            true => return Err("a class of no characters matches nothing".to_owned()),
            false => *out += &word(&format!("[{not}{ranges}]")),
        }
        Ok(())
    }

    /// A character of a literal or class, which may be escaped.
    fn character(&mut self, end: &str) -> Result<char, String> {
        let mut chars = self.rest.chars();
        let c = chars.next().ok_or_else(|| self.unexpected(end))?;
        if c != '\\' {
            self.rest = chars.as_str();
            return Ok(c);
        }
        let escaped = chars.next().ok_or_else(|| self.unexpected(end))?;
        let digits = match escaped {
            'n' | 'r' | 't' | '\\' | '"' | '[' | ']' | '-' | '^' | '/' => {
                self.rest = chars.as_str();
                return Ok(match escaped {
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    c => c,
                });
            }
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => {
                return Err(
                    self.unexpected("one of \\n \\r \\t \\\\ \\\" \\[ \\] \\- \\^ \\xHH \\uHHHH \\UHHHHHHHH")
                );
            }
        };
        let hex = chars.as_str().get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let c = hex
            .and_then(char::from_u32)
            .ok_or_else(|| self.unexpected("the hexadecimal digits of a character"))?;
        self.rest = &chars.as_str()[digits..];
        Ok(c)
    }

    fn name(&mut self) -> Option<String> {
        let end = self.rest.find(|c: char| !is_name(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!name.is_empty()).then(|| name.to_owned())
    }

    /// Whether the name that comes is that of the next rule.
    fn begins_rule(&self) -> bool {
        let mut ahead = Reader { rest: self.rest, text: self.text };
        ahead.name();
        ahead.skip();
        ahead.rest.starts_with("::=")
    }

    fn take(&mut self, expected: &str) -> bool {
        let rest = self.rest.strip_prefix(expected);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Skips spaces, line ends and comments.
    fn skip(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            if !self.rest.starts_with('#') {
                return;
            }
            self.rest = self.rest.split_once('\n').map_or("", |(_, rest)| rest);
        }
    }

    fn unexpected(&self, expected: &str) -> String {
        let line = self.text[..self.text.len() - self.rest.len()].matches('\n').count() + 1;
        let found: String = self.rest.chars().take(20).collect();
        match found.as_str() {
            "" => format!("expected {expected} at its end"),
            found => format!("line {line}: expected {expected}, found {found:?}"),
        }
    }
}

fn word(regex: &str) -> String {
    format!("/{regex}/")
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}
