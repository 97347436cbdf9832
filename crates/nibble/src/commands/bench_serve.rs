//! `nibble bench serve`: a load of completions for a server that speaks OpenAI's API, and how fast they come.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::args::BenchServe;
use crate::failure::{Failure, Result};
use crate::interrupt;
use crate::ui::{Ui, bold, dim, out};

/// Ids of prompts are below: every vocabulary in use is larger.
const ORDINARY_IDS: u64 = 3_000;

/// A client has little to remember.
const STACK: usize = 256 << 10;

pub(crate) fn run(args: &BenchServe, ui: Ui) -> Result<()> {
    // A server that goes away fails its requests alone.
    let (model, outcomes, seconds) = interrupt::surviving_broken_pipe(|| load(args, ui))?;
    report(args, &model, &outcomes, seconds, ui)
}

/// Sends the requests: the model that was asked, what became of each, and the seconds that all took.
fn load(args: &BenchServe, ui: Ui) -> Result<(String, Vec<Outcome>, f64)> {
    let client = Client::new(args)?;
    let arrivals = arrivals(args);
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::with_capacity(args.num_prompts));
    let bar = Mutex::new(ui.progress("Requests", args.num_prompts as u64));
    let start = Instant::now();
    let work = || {
        while let Some(&arrival) = arrivals.get(next.fetch_add(1, Ordering::Relaxed)) {
            std::thread::sleep(arrival.saturating_sub(start.elapsed()));
            let outcome = client.complete(args);
            let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
            outcomes.push(outcome);
            bar.lock().unwrap_or_else(PoisonError::into_inner).set(outcomes.len() as u64);
        }
    };
    std::thread::scope(|scope| -> std::io::Result<()> {
        for _ in 0..args.concurrency.min(args.num_prompts) {
            std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work)?;
        }
        Ok(())
    })
    .map_err(|e| Failure::machine(format!("the clients' threads cannot be started: {e}")))?;
    let seconds = start.elapsed().as_secs_f64();
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((client.model, outcomes, seconds))
}

/// When each request is sent: at once, or as visitors come who do not know of each other.
fn arrivals(args: &BenchServe) -> Vec<Duration> {
    let mut random = Random(args.seed ^ 0x9e37_79b9);
    let mut at = 0.0;
    (0..args.num_prompts)
        .map(|_| {
            if let Some(rate) = args.request_rate {
                // In (0, 1], so that the logarithm is finite.
                let uniform = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
                at -= (1.0 - uniform).ln() / rate;
            }
            Duration::from_secs_f64(at)
        })
        .collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

struct Client {
    agent: ureq::Agent,
    url: String,
    authorization: Option<String>,
    model: String,
    prefix: Vec<u64>,
    prompts: Mutex<Random>,
}

/// What is looked at of a part of an answer.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<IgnoredAny>,
    usage: Option<Usage>,
    error: Option<Error>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct Error {
    message: String,
}

/// What became of a request.
enum Outcome {
    Answer {
        /// Seconds to the first token and to the end.
        first: f64,
        whole: f64,
        /// Seconds from each part of the answer to the next.
        gaps: Vec<f64>,
        input: u64,
        output: u64,
    },
    Error(String),
}

impl Client {
    /// Asks the server for its model.
    fn new(args: &BenchServe) -> Result<Client> {
        let config = ureq::Agent::config_builder()
            // What is measured is the way to the server itself.
            .proxy(None)
            .http_status_as_error(false)
            .max_idle_connections_per_host(args.concurrency)
            .max_idle_connections(args.concurrency)
            .build();
        let is_url = args.url.parse().is_ok_and(|url: ureq::http::Uri| {
            matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
        });
        if !is_url {
            let expected = "expected where the server is, such as http://127.0.0.1:8000";
            return Err(Failure::input(format!("URL: {expected}, found {}", args.url)));
        }
        let url = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let mut random = Random(args.seed);
        let mut client = Client {
            agent: config.into(),
            authorization: args.api_key.as_ref().map(|key| format!("Bearer {key}")),
            model: String::new(),
            prefix: (0..args.shared_prefix_len.min(args.input_len))
                .map(|_| random.next() % ORDINARY_IDS)
                .collect(),
            prompts: Mutex::new(random),
            url,
        };
        let url = format!("{}/v1/models", client.url);
        let mut request = client.agent.get(&url);
        if let Some(authorization) = &client.authorization {
            request = request.header("authorization", authorization);
        }
        let failed =
            |found: String| Failure::machine(format!("{url}: expected a list of models, found: {found}"));
        let mut answer = request.call().map_err(|e| failed(e.to_string()))?;
        let status = answer.status();
        let body = answer.body_mut().read_to_string().map_err(|e| failed(e.to_string()))?;
        let models: Value = serde_json::from_str(&body).unwrap_or_default();
        let model = models["data"][0]["id"].as_str().ok_or_else(|| failed(format!("status {status}")))?;
        client.model = args.model.clone().unwrap_or_else(|| model.to_owned());
        Ok(client)
    }

    fn complete(&self, args: &BenchServe) -> Outcome {
        self.try_complete(args).unwrap_or_else(Outcome::Error)
    }

    fn try_complete(&self, args: &BenchServe) -> std::result::Result<Outcome, String> {
        let mut prompt = self.prefix.clone();
        let mut random = self.prompts.lock().unwrap_or_else(PoisonError::into_inner);
        prompt.resize_with(args.input_len, || random.next() % ORDINARY_IDS);
        drop(random);
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": args.output_len, "ignore_eos": true,
            "temperature": args.temperature, "stream": true, "stream_options": {"include_usage": true}
        });
        let mut request = self
            .agent
            .post(format!("{}/v1/completions", self.url))
            .header("content-type", "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let start = Instant::now();
        let mut answer = request.send(body.to_string()).map_err(|e| e.to_string())?;
        if answer.status() != 200 {
            let text = answer.body_mut().read_to_string().unwrap_or_default();
            return Err(format!(
                "status {}: {}",
                answer.status(),
                text.chars().take(200).collect::<String>()
            ));
        }
        let mut times: Vec<f64> = Vec::with_capacity(args.output_len);
        let (mut usage, mut done) = (None, false);
        let mut reader = BufReader::new(answer.body_mut().as_reader());
        let mut line = String::new();
        // To the very end, so that the connection can be used again.
        while reader.read_line(&mut line).map_err(|e| e.to_string())? > 0 {
            let now = start.elapsed().as_secs_f64();
            if let Some(data) = line.trim_end().strip_prefix("data: ") {
                if data == "[DONE]" {
                    done = true;
                } else {
                    let chunk: Chunk =
                        serde_json::from_str(data).map_err(|e| format!("a chunk is not JSON: {e}"))?;
                    if let Some(error) = chunk.error {
                        return Err(error.message);
                    }
                    if !chunk.choices.is_empty() {
                        times.push(now);
                    }
                    usage = chunk.usage.or(usage);
                }
            }
            line.clear();
        }
        let (Some(&first), true) = (times.first(), done) else {
            return Err("the stream ended early".to_owned());
        };
        Ok(Outcome::Answer {
            first,
            whole: start.elapsed().as_secs_f64(),
            gaps: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            input: usage.as_ref().map_or(prompt.len() as u64, |usage| usage.prompt_tokens),
            output: usage.as_ref().map_or(times.len() as u64, |usage| usage.completion_tokens),
        })
    }
}

fn report(args: &BenchServe, model: &str, outcomes: &[Outcome], seconds: f64, ui: Ui) -> Result<()> {
    let (mut firsts, mut wholes, mut gaps, mut per_token) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut inputs, mut outputs) = (0, 0);
    let mut errors: Vec<&str> = Vec::new();
    for outcome in outcomes {
        match outcome {
            Outcome::Error(error) => errors.push(error),
            Outcome::Answer { first, whole, gaps: own, input, output } => {
                firsts.push(*first);
                wholes.push(*whole);
                gaps.extend(own);
                if *output > 1 {
                    per_token.push((whole - first) / (output - 1) as f64);
                }
                inputs += input;
                outputs += output;
            }
        }
    }
    if firsts.is_empty() {
        let error = errors.first().copied().unwrap_or("no request was sent");
        return Err(Failure::machine(format!("{}: no request was answered: {error}", args.url)));
    }
    let done = firsts.len();
    let times = [
        ("time to first token", "ttft_ms", percentiles(firsts)),
        ("time per output token", "tpot_ms", percentiles(per_token)),
        ("inter-token latency", "itl_ms", percentiles(gaps)),
        ("end to end", "e2e_ms", percentiles(wholes)),
    ];
    let per_second = |count: f64| count / seconds;
    if ui.json {
        let mut document = json!({
            "url": args.url, "model": model, "requests": done, "errors": errors.len(), "first_error": errors.first(),
            "seconds": seconds, "requests_per_second": per_second(done as f64),
            "input_tokens": inputs, "output_tokens": outputs,
            "output_tokens_per_second": per_second(outputs as f64),
            "total_tokens_per_second": per_second((inputs + outputs) as f64),
        });
        for (_, key, [mean, p50, p90, p99]) in times {
            document[key] = json!({"mean": mean, "p50": p50, "p90": p90, "p99": p99});
        }
        ui.document(&document)?;
        return Ok(());
    }
    out!("{}", dim(&format!("{model} at {}, {} clients", args.url, args.concurrency)))?;
    out!("{done} requests in {seconds:.2} s: {:.1} per second", per_second(done as f64))?;
    let (input, output) = (per_second(inputs as f64), per_second(outputs as f64));
    out!("{input:.0} input and {output:.0} output tokens per second")?;
    out!("{}", bold("milliseconds              mean       p50       p90       p99"))?;
    for (name, _, [mean, p50, p90, p99]) in times {
        out!("{name:<22} {mean:>9.2} {p50:>9.2} {p90:>9.2} {p99:>9.2}")?;
    }
    if let Some(error) = errors.first() {
        out!("{} errors, such as: {error}", errors.len())?;
    }
    Ok(())
}

/// Mean, median, 90th and 99th of a hundred, in milliseconds; zeros if there is nothing.
fn percentiles(mut seconds: Vec<f64>) -> [f64; 4] {
    seconds.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        let last = seconds.len().saturating_sub(1);
        seconds.get((share * last as f64).round() as usize).map_or(0.0, |value| value * 1e3)
    };
    let mean = seconds.iter().sum::<f64>() / seconds.len().max(1) as f64 * 1e3;
    [mean, at(0.5), at(0.9), at(0.99)]
}

#[cfg(test)]
mod tests {
    use super::percentiles;

    #[test]
    fn percentiles_of_few() {
        let hundred = (0..=100).rev().map(|i| f64::from(i) / 1e3).collect();
        let close = |found: [f64; 4], expected: [f64; 4]| {
            found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-9)
        };
        assert!(close(percentiles(hundred), [50.0, 50.0, 90.0, 99.0]));
        assert!(close(percentiles(vec![0.002]), [2.0; 4]));
        assert!(close(percentiles(Vec::new()), [0.0; 4]));
    }
}
