//! Properties over random text, with the regular expression itself as the oracle of the hand-written matcher.

use proptest::prelude::*;
use tokenizer::{Detokenizer, PATTERN, Tokenizer};

use crate::tiny;

/// Text rich in what the pattern tells apart.
fn text() -> impl Strategy<Value = String> {
    let letters = prop::sample::select(vec![
        'a', 'b', 's', 'S', 'T', 'A', 'É', 'ß', 'ǅ', 'ʰ', 'ª', '中', 'あ', 'ا', '\u{301}', '\u{903}', 'ſ',
        '\'', '\'', 'l', 'r', 'e', 'v', 'd', 'm', '1', '٣', '½', 'Ⅷ', ' ', ' ', '\t', '\n', '\r', '\u{a0}',
        '\u{2028}', '\u{3000}', '\u{200b}', '\u{feff}', '\u{1c}', '\u{85}', '/', '!', '.', '<', '|', '>',
        '_', '€', '🧑', '\u{200d}', '🚀', '\0',
    ]);
    prop_oneof![
        4 => proptest::collection::vec(letters, 0..40).prop_map(|c| c.into_iter().collect()),
        1 => proptest::collection::vec(any::<char>(), 0..20).prop_map(|c| c.into_iter().collect()),
    ]
}

thread_local! {
    static ORACLE: fancy_regex::Regex = fancy_regex::Regex::new(PATTERN).unwrap();
    static TINY: Tokenizer = tiny();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn pieces_are_those_of_the_pattern(text in text()) {
        let found = Tokenizer::o200k_harmony().pieces(&text);
        let expected: Vec<String> = ORACLE.with(|regex| {
            regex.find_iter(&text).map(|m| m.unwrap().as_str().to_owned()).collect()
        });
        prop_assert_eq!(found, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn ids_are_those_of_tiktoken(text in text(), words in "(\\PC{1,12}|[A-Za-z]{1,60}| ){0,12}") {
        let oracle = tiktoken_rs::o200k_base_singleton();
        for text in [text, words] {
            prop_assert_eq!(Tokenizer::o200k_harmony().encode(&text), oracle.encode_ordinary(&text));
        }
    }

    #[test]
    fn decoding_undoes_encoding(text in text()) {
        let tokenizer = Tokenizer::o200k_harmony();
        let ids = tokenizer.encode(&text);
        prop_assert!(ids.iter().all(|&id| !tokenizer.is_special(id)));
        prop_assert_eq!(tokenizer.decode(&ids), text.clone());
        let ids = tokenizer.encode_with_special(&text);
        prop_assert_eq!(tokenizer.decode(&ids), text.clone());
        let back = TINY.with(|tiny| tiny.decode(&tiny.encode(&text)));
        prop_assert_eq!(back, text);
    }

    #[test]
    fn any_chunking_gives_the_same_text(
        bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0x80u8..=0xf4], 0..60),
        cuts in proptest::collection::vec(0usize..60, 0..20),
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let mut detokenizer = Detokenizer::new();
        let mut text: String = cuts.windows(2).map(|w| detokenizer.push(&bytes[w[0]..w[1]])).collect();
        text += &detokenizer.finish();
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn long_pieces_merge_as_tiktokens_do(
        unit in "[a-d]{1,6}|[ =-]{1,3}|[A-Za-zé中]{1,80}",
        repeats in prop_oneof![1usize..60, 500usize..1_000],
    ) {
        // Across the switches of algorithm by length.
        let text = unit.repeat(repeats);
        let text = &text[..text.floor_char_boundary(6_000)];
        let oracle = tiktoken_rs::o200k_base_singleton();
        prop_assert_eq!(Tokenizer::o200k_harmony().encode(text), oracle.encode_ordinary(text));
    }
}
