//! Words and numbers for people, and names from outside made harmless for HTML, Markdown and YAML.

/// What stands for a number that is not there.
pub(super) const NONE: &str = "–";

/// `text` on one line and in the order it is stored: control and bidirectional characters are replaced.
pub(super) fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}' | '\u{feff}' => {
                '\u{fffd}'
            }
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// `visible(text)` of at most `limit` characters, for places that cannot wrap.
pub(super) fn short(text: &str, limit: usize) -> String {
    let text = visible(text);
    if text.chars().count() <= limit {
        return text;
    }
    text.chars().take(limit.saturating_sub(1)).chain(['…']).collect()
}

/// `text` as the content of an HTML element or of a quoted attribute.
pub(super) fn html(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in visible(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// `text` as Markdown code, in a paragraph or in a table's cell. Names as they are usual give a code span; what could end the
/// span or the cell is written as character references, which mean nothing to Markdown.
pub(super) fn code(text: &str) -> String {
    let text = visible(text);
    let text = text.trim();
    if text.is_empty() {
        NONE.to_owned()
    } else if text.chars().all(|c| c.is_alphanumeric() || " -_./:=+,@~()".contains(c)) {
        format!("`{text}`")
    } else {
        format!("<code>{}</code>", references(text))
    }
}

/// `text` as Markdown prose, in a paragraph or in a table's cell, with no markup of its own.
pub(super) fn prose(text: &str) -> String {
    references(visible(text).trim())
}

/// `text` as a fenced block of Markdown.
pub(super) fn fenced(language: &str, text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(3.max(longest + 1));
    format!("{fence}{language}\n{}\n{fence}\n", visible(text))
}

/// `text` as a double-quoted YAML scalar.
pub(super) fn yaml(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            c if c.is_control() || !is_yaml_printable(c) => {
                quoted.push_str(&format!("\\U{:08X}", u32::from(c)))
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

/// Three significant figures.
pub(super) fn figures(value: f64) -> String {
    significant(value, 3)
}

/// Four significant figures: what quantizing changes in a perplexity is often in the fourth.
pub(super) fn perplexity(nll: f64) -> String {
    significant(nll.exp(), 4)
}

/// `decimals` places after the point.
pub(super) fn fixed(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return NONE.to_owned();
    }
    if value.abs() >= 1e9 { format!("{value:.2e}") } else { format!("{value:.decimals$}") }
}

/// A value that may be missing.
pub(super) fn optional(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| NONE.to_owned(), text)
}

/// A share, in percent.
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{} %", figures(share * 100.0)) } else { NONE.to_owned() }
}

/// By how much `new` differs from `old`, in percent and with its sign; nothing if that cannot be said.
pub(super) fn change(old: f64, new: f64) -> Option<String> {
    let percent = (new / old - 1.0) * 100.0;
    if !percent.is_finite() {
        return None;
    }
    let decimals = if percent.abs() < 10.0 { 2 } else { 0 };
    let sign = if percent < 0.0 { "−" } else { "+" };
    Some(format!("{sign}{} %", fixed(percent.abs(), decimals)))
}

/// Bytes in powers of a thousand, as disks and downloads are sold.
pub(super) fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{} {unit}", figures(value)) };
        }
        value /= 1000.0;
    }
    format!("{} TB", figures(value))
}

/// A whole number with its thousands set apart.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A whole number of any size in one glance: `20.9 billion`.
pub(super) fn rough(number: u64) -> String {
    let value = number as f64;
    match value {
        ..999.5e3 => count(number),
        ..999.5e6 => format!("{} million", figures(value / 1e6)),
        _ => format!("{} billion", figures(value / 1e9)),
    }
}

/// `number` and what is counted.
pub(super) fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// A time span.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return NONE.to_owned();
    }
    if seconds < 59.95 {
        return format!("{} s", fixed(seconds, if seconds < 10.0 { 2 } else { 1 }));
    }
    let whole = seconds.round() as u64;
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    if hours > 0 { format!("{hours} h {minutes:02} min") } else { format!("{minutes} min {rest:02} s") }
}

fn significant(value: f64, figures: i32) -> String {
    if !value.is_finite() {
        return NONE.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs();
    if !(1e-4..1e6).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    let decimals = (figures - 1 - magnitude.log10().floor() as i32).max(0) as usize;
    format!("{value:.decimals$}")
}

/// Markdown's and HTML's punctuation as numeric references.
fn references(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        // Of ASCII only what no construct of Markdown is made of stays as it is.
        if c.is_ascii_punctuation() && !" ,.;?%".contains(c) {
            escaped.push_str(&format!("&#{};", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// YAML's `c-printable`, less the line breaks that only YAML 1.1 knows.
fn is_yaml_printable(c: char) -> bool {
    matches!(c, ' '..='~' | '\u{a0}'..='\u{2027}' | '\u{202f}'..='\u{2065}' | '\u{206a}'..='\u{d7ff}'
        | '\u{e000}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}' | '\u{10000}'..='\u{10ffff}')
}
