//! The rules of the sampling parameters.

use engine::SamplingParams;

type Change = fn(&mut SamplingParams);

const VOCABULARY: usize = 1000;

fn changed(change: Change) -> SamplingParams {
    let mut params = SamplingParams::default();
    change(&mut params);
    params
}

#[test]
fn what_breaks_a_rule_is_named() {
    let cases: &[(Change, &str)] = &[
        (|p| p.n = 0, "`n` must be in [1, 128], got 0."),
        (|p| p.n = 129, "`n` must be in [1, 128], got 129."),
        (|p| p.temperature = f32::NAN, "`temperature` must be in [0, 2], got NaN."),
        (|p| p.temperature = f32::INFINITY, "`temperature` must be in [0, 2], got inf."),
        (|p| p.temperature = -0.1, "`temperature` must be in [0, 2], got -0.1."),
        (|p| p.temperature = 3.0, "`temperature` must be in [0, 2], got 3."),
        (|p| (p.temperature, p.n) = (0.0, 2), "`n` must be 1 when using greedy sampling, got 2."),
        (|p| p.top_p = 0.0, "`top_p` must be in (0, 1], got 0."),
        (|p| p.top_p = 1.1, "`top_p` must be in (0, 1], got 1.1."),
        (|p| p.top_p = f32::NAN, "`top_p` must be in (0, 1], got NaN."),
        (|p| p.min_p = -0.5, "`min_p` must be in [0, 1], got -0.5."),
        (|p| p.min_p = f32::NAN, "`min_p` must be in [0, 1], got NaN."),
        (|p| p.min_tokens = 17, "`min_tokens` must be less than or equal to max_tokens=16, got 17."),
        (|p| p.stop = vec!["x".into(); 17], "`stop` must have at most 16 strings, got 17."),
        (|p| p.stop = vec![String::new()], "`stop` must have strings of 1 to 256 bytes, got one of 0."),
        (|p| p.stop = vec!["x".repeat(257)], "`stop` must have strings of 1 to 256 bytes, got one of 257."),
        (|p| p.stop_token_ids = vec![1; 257], "`stop_token_ids` must have at most 256 ids, got 257."),
        (
            |p| p.stop_token_ids = vec![1000],
            "`stop_token_ids` contains the token id 1000, which is out of vocabulary. Vocabulary size: 1000",
        ),
        (
            |p| p.logprobs = Some(1001),
            "`logprobs` must be at most the size of the vocabulary, 1000, got 1001.",
        ),
        (
            |p| p.prompt_logprobs = Some(1001),
            "`prompt_logprobs` must be at most the size of the vocabulary, 1000, got 1001.",
        ),
        (|p| p.presence_penalty = 2.1, "`presence_penalty` must be in [-2, 2], got 2.1."),
        (|p| p.frequency_penalty = f32::NAN, "`frequency_penalty` must be in [-2, 2], got NaN."),
        (|p| p.repetition_penalty = 0.0, "`repetition_penalty` must be greater than 0 and finite, got 0."),
        (
            |p| p.repetition_penalty = f32::INFINITY,
            "`repetition_penalty` must be greater than 0 and finite, got inf.",
        ),
        (
            |p| p.logit_bias = (0..1000).chain(2000..2025).map(|t| (t, 1.0)).collect(),
            "`logit_bias` must have at most 1024 entries, got 1025.",
        ),
        (
            |p| p.logit_bias = [(4000, 1.0)].into(),
            "`logit_bias` contains the token id 4000, which is out of vocabulary. Vocabulary size: 1000",
        ),
        (
            |p| p.logit_bias = [(4, f32::NAN)].into(),
            "`logit_bias` must have numbers as values, got NaN for 4.",
        ),
    ];
    for (change, message) in cases {
        assert_eq!(changed(*change).validate(VOCABULARY).unwrap_err().to_string(), *message);
    }
}

#[test]
fn what_is_valid_is_normalized() {
    let cases: &[(Change, Change)] = &[
        (|_| (), |_| ()),
        (|p| p.temperature = 0.005, |p| p.temperature = 0.01),
        (|p| p.temperature = 2.0, |p| p.temperature = 2.0),
        (|p| p.repetition_penalty = 1e-38, |p| p.repetition_penalty = 1e-3),
        (
            |p| (p.temperature, p.top_p, p.top_k, p.min_p) = (1e-6, 0.5, 3, 0.5),
            |p| (p.temperature, p.top_p, p.top_k, p.min_p) = (0.0, 1.0, 0, 0.0),
        ),
        (|p| p.seed = Some(-1), |p| p.seed = None),
        (|p| p.seed = Some(i64::MIN), |p| p.seed = Some(i64::MIN)),
        (|p| p.stop_token_ids = vec![9, 3, 9], |p| p.stop_token_ids = vec![3, 9]),
        (
            |p| p.allowed_token_ids = Some(vec![9, 3, 9].into()),
            |p| p.allowed_token_ids = Some(vec![3, 9].into()),
        ),
        (
            |p| p.logit_bias = [(1, 1e9), (2, f32::NEG_INFINITY)].into(),
            |p| p.logit_bias = [(1, 100.0), (2, -100.0)].into(),
        ),
        (|p| (p.max_tokens, p.min_tokens) = (None, 99), |p| (p.max_tokens, p.min_tokens) = (None, 99)),
        (|p| p.logprobs = Some(1000), |p| p.logprobs = Some(1000)),
    ];
    for (given, expected) in cases {
        assert_eq!(changed(*given).validate(VOCABULARY), Ok(changed(*expected)));
    }
}

#[test]
fn allowed_tokens_are_shared_by_all_prompts() {
    let once = changed(|p| p.allowed_token_ids = Some(vec![9, 3].into())).validate(VOCABULARY).unwrap();
    let [one, again] =
        [once.clone(), once.validate(VOCABULARY).unwrap()].map(|p| p.allowed_token_ids.unwrap());
    assert_eq!(one.as_ptr(), again.as_ptr());
}
