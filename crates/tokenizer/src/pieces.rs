//! The pre-tokenizer: o200k's regular expression as a hand-written matcher, linear on any text.

use crate::classes::RUNS;

/// The pattern that this module matches; the only one known.
pub const PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Length in bytes of the piece at the start of `text`, which is not empty.
pub(crate) fn piece_len(text: &str) -> usize {
    debug_assert!(!text.is_empty());
    word(text)
        .or_else(|| number(text))
        .or_else(|| symbols(text))
        .or_else(|| space(text))
        .unwrap_or_else(|| text.chars().next().map_or(0, char::len_utf8))
}

/// What the pattern tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// `\p{Lu}`, `\p{Lt}`
    Upper,
    /// `\p{Ll}`
    Lower,
    /// `\p{Lm}`, `\p{Lo}`
    Letter,
    /// `\p{M}`
    Mark,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
    Other,
}

/// In the order of the numbers in `RUNS`.
const CLASSES: [Class; 7] =
    [Class::Upper, Class::Lower, Class::Letter, Class::Mark, Class::Number, Class::Space, Class::Other];

/// The classes of 256 characters each: first a block for each class alone, then the 139 mixed ones.
struct Blocks {
    /// Which block the characters `index << 8 ..` have.
    index: [u8; 0x1100],
    classes: [[Class; 256]; CLASSES.len() + 139],
}

static BLOCKS: Blocks = {
    let mut blocks = Blocks { index: [0; 0x1100], classes: [[Class::Other; 256]; CLASSES.len() + 139] };
    let mut used = 0;
    while used < CLASSES.len() {
        blocks.classes[used] = [CLASSES[used]; 256];
        used += 1;
    }
    let (mut run, mut block) = (0, 0);
    while block < blocks.index.len() {
        let first = (block as u32) << 8;
        while run + 1 < RUNS.len() && RUNS[run + 1].0 <= first {
            run += 1;
        }
        if run + 1 == RUNS.len() || RUNS[run + 1].0 >= first + 256 {
            blocks.index[block] = RUNS[run].1;
        } else {
            let mut low = 0;
            while low < 256 {
                if run + 1 < RUNS.len() && RUNS[run + 1].0 == first + low {
                    run += 1;
                }
                blocks.classes[used][low as usize] = CLASSES[RUNS[run].1 as usize];
                low += 1;
            }
            blocks.index[block] = used as u8;
            used += 1;
        }
        block += 1;
    }
    assert!(used == blocks.classes.len());
    blocks
};

impl Class {
    fn of(c: char) -> Class {
        let c = c as usize;
        BLOCKS.classes[usize::from(BLOCKS.index[c >> 8])][c & 0xff]
    }

    /// In the first character class of the word alternatives.
    fn starts_word(self) -> bool {
        matches!(self, Class::Upper | Class::Letter | Class::Mark)
    }

    /// In the second.
    fn ends_word(self) -> bool {
        matches!(self, Class::Lower | Class::Letter | Class::Mark)
    }
}

/// The first two alternatives.
fn word(text: &str) -> Option<usize> {
    let first = text.chars().next()?;
    let class = Class::of(first);
    let prefix = !matches!(first, '\r' | '\n') && matches!(class, Class::Mark | Class::Space | Class::Other);
    let after = &text[first.len_utf8()..];
    // With the prefix first; without it, only a mark can begin a word.
    let with_prefix = |len: Option<usize>| len.map(|len| len + first.len_utf8());
    let len = if prefix {
        let without = || (class == Class::Mark).then(|| run(text));
        let (long, short) = (run(after), without());
        with_prefix(long.lower())
            .or_else(|| short.as_ref().and_then(Run::lower))
            .or_else(|| with_prefix(long.upper()))
            .or_else(|| short.as_ref().and_then(Run::upper))
    } else {
        let run = run(text);
        run.lower().or_else(|| run.upper())
    }?;
    Some(len + contraction(&text[len..]))
}

/// A run of `starts_word` characters and the run of `ends_word` characters after it, measured in bytes.
struct Run {
    /// End of the first run.
    start: usize,
    /// End of its last character that is also in `ends_word`.
    last_both: Option<usize>,
    /// End of the second run.
    end: usize,
}

impl Run {
    /// `[starts]*[ends]+`: if nothing follows the first run, it gives back what the second needs.
    fn lower(&self) -> Option<usize> {
        if self.end > self.start { Some(self.end) } else { self.last_both }
    }

    /// `[starts]+[ends]*`
    fn upper(&self) -> Option<usize> {
        (self.start > 0).then_some(self.end)
    }
}

fn run(text: &str) -> Run {
    let mut chars = text.chars();
    let mut run = Run { start: text.len(), last_both: None, end: text.len() };
    let mut at = 0;
    let mut next = loop {
        let Some(c) = chars.next() else { return run };
        let class = Class::of(c);
        if !class.starts_word() {
            break Some((c, class));
        }
        at += c.len_utf8();
        if class != Class::Upper {
            run.last_both = Some(at);
        }
    };
    run.start = at;
    while let Some((c, class)) = next {
        if !class.ends_word() {
            break;
        }
        at += c.len_utf8();
        next = chars.next().map(|c| (c, Class::of(c)));
    }
    run.end = at;
    run
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)?`; the long s folds to s.
fn contraction(text: &str) -> usize {
    let Some(rest) = text.strip_prefix('\'') else { return 0 };
    let mut chars = rest.chars();
    let lower = |c: Option<char>| c.map(|c| c.to_ascii_lowercase());
    match (lower(chars.next()), lower(chars.next())) {
        (Some('s' | 't' | 'm' | 'd'), _) => 2,
        (Some('ſ'), _) => 1 + 'ſ'.len_utf8(),
        (Some('r' | 'v'), Some('e')) | (Some('l'), Some('l')) => 3,
        _ => 0,
    }
}

/// `\p{N}{1,3}`
fn number(text: &str) -> Option<usize> {
    let len: usize =
        text.chars().take(3).take_while(|&c| Class::of(c) == Class::Number).map(char::len_utf8).sum();
    (len > 0).then_some(len)
}

/// ` ?[^\s\p{L}\p{N}]+[\r\n/]*`
fn symbols(text: &str) -> Option<usize> {
    let body = text.strip_prefix(' ').unwrap_or(text);
    let symbol = |c: char| matches!(Class::of(c), Class::Mark | Class::Other);
    let rest = body.trim_start_matches(symbol);
    if rest.len() == body.len() {
        return None;
    }
    Some(text.len() - rest.trim_start_matches(['\r', '\n', '/']).len())
}

/// `\s*[\r\n]+`, `\s+(?!\S)`, `\s+`
fn space(text: &str) -> Option<usize> {
    let rest = text.trim_start_matches(|c| Class::of(c) == Class::Space);
    let run = &text[..text.len() - rest.len()];
    if let Some(newline) = run.rfind(['\r', '\n']) {
        return Some(newline + 1);
    }
    let last = run.chars().next_back()?;
    // A run before a word leaves its last character to the word, if it has another.
    let shorter = run.len() - last.len_utf8();
    Some(if rest.is_empty() || shorter == 0 { run.len() } else { shorter })
}

#[cfg(test)]
mod tests {
    use super::Class;

    #[test]
    fn every_character_has_the_class_of_the_oracle() {
        let text: String = ('\0'..=char::MAX).collect();
        let mut expected = vec![Class::Other; 0x11_0000];
        for (pattern, class) in [
            (r"[\p{Lu}\p{Lt}]", Class::Upper),
            (r"\p{Ll}", Class::Lower),
            (r"[\p{Lm}\p{Lo}]", Class::Letter),
            (r"\p{M}", Class::Mark),
            (r"\p{N}", Class::Number),
            (r"\s", Class::Space),
        ] {
            for found in fancy_regex::Regex::new(pattern).unwrap().find_iter(&text) {
                let c = found.unwrap().as_str().chars().next().unwrap();
                assert_eq!(expected[c as usize], Class::Other, "{c:?}: two classes");
                expected[c as usize] = class;
            }
        }
        for c in '\0'..=char::MAX {
            assert_eq!(Class::of(c), expected[c as usize], "{c:?}");
        }
    }
}
