//! Tokens and log-probabilities from logits on the device: what `sampling.cu` is asked for, row by row, and what it answers.

use std::collections::HashSet;
use std::sync::Arc;

use bytemuck::Zeroable;
use gptoss::{
    Error, Logprobs, SORTED_HEAD, Sampled, Sampling, TokenLogprobs, log_sum, random, sample, score,
};

use crate::arena::LOGIT_ROWS;
use crate::backend::no_room;
use crate::device::{Buffer, Device, Pinned};
use crate::driver::Address;
use crate::params::{Job, Record, Samples};

/// Jobs of a round: a token and its log-probabilities for each row of logits.
const MAX_JOBS: usize = 2 * LOGIT_ROWS;
/// Copies of rows that are changed while their raw logits are still needed; with more of them there is another round.
const COPIES: usize = 16;
/// Blocks that share a row.
const SLICES: usize = 32;
/// Bins of distances from the largest logit.
const BINS: usize = 512;
/// The most tokens of a row that are sorted on the device; what needs more goes to the host. `CAPACITY` of sampling.cu, too.
const CAPACITY: usize = SORTED_HEAD;
/// Rows that the host draws from at a time, at most, each on a thread of its own.
const HOST_ROWS: usize = 32;
const THREADS: u32 = 256;
const DRAWERS: u32 = 1024;
/// `Kind` of sampling.cu.
const DRAW: u32 = 0;
const DRAW_PROCESSED: u32 = 1;
const DISTRIBUTION: u32 = 2;
/// Biases of a token that is drawn in a lane, or its log-probabilities, at most, and bytes of a lane, each way: two jobs or records, with a pair of
/// words or two for each of these.
const LANE_IDS: usize = 256;
const LANE_BYTES: usize = 8 << 10;
const _: () = assert!(
    2 * (size_of::<Job>() + 4 * 2 * LANE_IDS) <= LANE_BYTES && 2 * 4 * (RECORD + 2 * LANE_IDS) <= LANE_BYTES
);
/// No record.
const NONE: u32 = u32::MAX;
/// Words of a record.
const RECORD: usize = size_of::<Record>() / 4;

/// What is wanted of a row of logits.
pub(crate) enum Wanted<'a> {
    /// The log-probability of a token and of the best.
    Score { row: usize, token: u32, top: usize },
    /// A token drawn. `kept`: the row's raw logits are wanted, too.
    Token { row: usize, sampling: &'a Sampling, kept: bool },
}

pub(crate) struct Sampler {
    tables: Tables,
    /// Of rounds of any size.
    exchange: Exchange,
    /// Of steps of one token, two of which may be under way. These stay where they are.
    lanes: [Exchange; 2],
}

/// What the kernels scribble on.
struct Tables {
    device: Arc<Device>,
    vocabulary: usize,
    best: Buffer,
    sums: Buffer,
    bins: Buffer,
    progress: Buffer,
    candidates: Buffer,
    /// u32 `[MAX_JOBS]`, ids of the largest logits of changed rows
    largest: Buffer,
    /// f32 `[COPIES, vocabulary]`; a lane has the copy of its number
    copies: Buffer,
}

/// A round's way to the device and back.
struct Exchange {
    /// Jobs, then the words that they point to.
    words: Buffer,
    words_host: Pinned,
    out: Buffer,
    out_host: Pinned,
}

impl Sampler {
    pub(crate) fn new(device: &Arc<Device>, vocabulary: usize) -> Result<Sampler, Error> {
        let lane = || Exchange::new(device, LANE_BYTES, LANE_BYTES);
        Ok(Sampler {
            tables: Tables {
                device: Arc::clone(device),
                vocabulary,
                best: device.buffer(MAX_JOBS * SLICES * 8)?,
                sums: device.buffer(MAX_JOBS * SLICES * 8)?,
                bins: device.buffer(MAX_JOBS * BINS * 4)?,
                progress: device.buffer(MAX_JOBS * 16)?,
                candidates: device.buffer(MAX_JOBS * CAPACITY * 8)?,
                largest: device.buffer(MAX_JOBS * 4)?,
                copies: device.buffer(COPIES * vocabulary * 4)?,
            },
            exchange: Exchange::new(device, MAX_JOBS * size_of::<Job>(), MAX_JOBS * RECORD * 4)?,
            lanes: [lane()?, lane()?],
        })
    }

    /// One answer for each row that is wanted, in order; those of scores have the token that was given. Masks are waited for. `row` is
    /// room for one row.
    pub(crate) fn run(
        &mut self,
        wanted: &[Wanted<'_>],
        logits: &Buffer,
        largest: &Buffer,
        row: &mut Pinned,
    ) -> Result<Vec<Sampled>, Error> {
        let (mut answers, mut rest) = (Vec::with_capacity(wanted.len()), wanted);
        while !rest.is_empty() {
            let (mut jobs, mut copies, mut count) = (0, 0, 0);
            for wanted in rest {
                jobs += 1 + usize::from(wanted.has_distribution());
                copies += usize::from(wanted.is_copied());
                if jobs > MAX_JOBS || copies > COPIES {
                    break;
                }
                count += 1;
            }
            let (now, later) = rest.split_at(count);
            let round = self.tables.round(now, logits, largest, 0);
            self.exchange.make_room(&self.tables.device, &round)?;
            let round = self.tables.send(round, &mut self.exchange)?;
            self.tables.device.synchronize()?;
            answers.extend(self.tables.answers(now, &round, &self.exchange, row)?);
            rest = later;
        }
        Ok(answers)
    }

    /// Whether a token drawn so has room in a lane, and the one after it is drawn likewise.
    pub(crate) fn goes_on(sampling: &Sampling) -> bool {
        let few = |logprobs: &Logprobs| logprobs.top.max(logprobs.ids.len()) <= LANE_IDS;
        sampling.mask.is_none()
            && sampling.penalties.is_none()
            && sampling.bias.len() <= LANE_IDS
            && sampling.logprobs.as_ref().is_none_or(few)
    }

    /// Where a lane has the token that was drawn, on the device.
    pub(crate) fn drawn(&self, lane: usize) -> Address {
        // The first word of the first record.
        self.lanes[lane].out.address()
    }

    /// That token, which has been waited for.
    pub(crate) fn found(&self, lane: usize) -> u32 {
        self.lanes[lane].out_host.slice()[0]
    }

    /// Puts the drawing of a token from the lane's row on the stream. It [`goes_on`](Sampler::goes_on).
    pub(crate) fn begin(
        &mut self,
        lane: usize,
        sampling: &Sampling,
        logits: &Buffer,
        largest: &Buffer,
    ) -> Result<Round, Error> {
        let wanted = [Wanted::Token { row: lane, sampling, kept: false }];
        self.tables.send(self.tables.round(&wanted, logits, largest, lane), &mut self.lanes[lane])
    }

    /// The token that such a round drew, which has been waited for.
    pub(crate) fn end(
        &self,
        lane: usize,
        sampling: &Sampling,
        round: &Round,
        row: &mut Pinned,
    ) -> Result<Vec<Sampled>, Error> {
        let wanted = [Wanted::Token { row: lane, sampling, kept: false }];
        self.tables.answers(&wanted, round, &self.lanes[lane], row)
    }
}

impl Exchange {
    fn new(device: &Arc<Device>, words: usize, out: usize) -> Result<Exchange, Error> {
        Ok(Exchange {
            words: device.buffer(words)?,
            words_host: device.pinned(words)?,
            out: device.buffer(out)?,
            out_host: device.pinned(out)?,
        })
    }

    fn make_room(&mut self, device: &Arc<Device>, round: &Round) -> Result<(), Error> {
        let refused = |error| no_room(error, device, "what tokens of a step are drawn by");
        let words = round.word_bytes();
        if words > self.words.bytes() {
            self.words_host = device.pinned(words.next_power_of_two())?;
            self.words = device.buffer(words.next_power_of_two()).map_err(refused)?;
        }
        let out = 4 * round.out_words;
        if out > self.out.bytes() {
            self.out_host = device.pinned(out.next_power_of_two())?;
            self.out = device.buffer(out.next_power_of_two()).map_err(refused)?;
        }
        Ok(())
    }

    fn record(&self, job: &Job) -> Record {
        let words = &self.out_host.slice::<u32>()[job.out as usize..][..RECORD];
        bytemuck::pod_read_unaligned(bytemuck::cast_slice(words))
    }

    fn failed(&self, job: &Job) -> bool {
        self.record(job).failed != 0
    }
}

impl Tables {
    /// Jobs for what is wanted, with copies from that one on.
    fn round(&self, wanted: &[Wanted<'_>], logits: &Buffer, largest: &Buffer, copy: usize) -> Round {
        let mut round = Round::default();
        let row_bytes = (self.vocabulary * 4) as u64;
        let mut copies = copy as u64;
        for wanted in wanted {
            let &(Wanted::Score { row, .. } | Wanted::Token { row, .. }) = wanted;
            let raw = Job {
                logits: logits.address() + row as u64 * row_bytes,
                source: logits.address() + row as u64 * row_bytes,
                largest: largest.address() + 4 * row as u64,
                temperature: 1.0,
                top_p: 1.0,
                token_from: NONE,
                ..Zeroable::zeroed()
            };
            match *wanted {
                Wanted::Score { token, top, .. } => {
                    let job = Job { kind: DISTRIBUTION, token, top: top as u32, ..raw };
                    round.push(job, &[]);
                }
                Wanted::Token { sampling, .. } => {
                    let mut job = raw;
                    if is_modified(sampling) {
                        job.largest = self.largest.address() + 4 * round.jobs.len() as u64;
                    }
                    if wanted.is_copied() {
                        job.logits = self.copies.address() + copies * row_bytes;
                        copies += 1;
                    }
                    round.push_token(job, raw, sampling);
                }
            }
        }
        round
    }

    /// Puts a round on the stream, with its way there and back. There is room for it.
    fn send(&self, mut round: Round, exchange: &mut Exchange) -> Result<Round, Error> {
        let words = exchange.words_host.slice_mut::<u8>();
        let jobs_bytes = size_of_val(&round.jobs[..]);
        round.point(exchange.words.address() + jobs_bytes as u64);
        words[..jobs_bytes].copy_from_slice(bytemuck::cast_slice(&round.jobs));
        words[jobs_bytes..][..4 * round.words.len()].copy_from_slice(bytemuck::cast_slice(&round.words));
        exchange.words.upload(0, &exchange.words_host, round.word_bytes())?;
        self.launch(&round, exchange)?;
        exchange.out.download(0, &mut exchange.out_host, 4 * round.out_words)?;
        Ok(round)
    }

    /// The answers of a round that is done.
    fn answers(
        &self,
        wanted: &[Wanted<'_>],
        round: &Round,
        exchange: &Exchange,
        row: &mut Pinned,
    ) -> Result<Vec<Sampled>, Error> {
        let mut jobs = round.jobs.iter();
        let mut job = || jobs.next().expect("there is a job for whatever is wanted");
        let mut answers = Vec::with_capacity(wanted.len());
        // Those that the host draws, with their places.
        let mut host = Vec::new();
        let at_once = std::thread::available_parallelism().map_or(1, |n| n.get()).min(HOST_ROWS);
        for wanted in wanted {
            answers.push(match *wanted {
                Wanted::Score { token, top, .. } => {
                    let logprobs = Some(self.score(exchange, job(), token, top, &[], row)?);
                    Sampled { token, logprobs }
                }
                Wanted::Token { sampling, .. } => {
                    let drawn = job();
                    match self.token(
                        exchange,
                        drawn,
                        wanted.has_distribution().then(&mut job),
                        sampling,
                        row,
                    )? {
                        Drawn::Token(sampled) => sampled,
                        Drawn::ByHost(draw) => {
                            host.push((answers.len(), draw));
                            Sampled { token: 0, logprobs: None }
                        }
                    }
                }
            });
            if host.len() == at_once {
                draw_all(&mut host, &mut answers);
            }
        }
        draw_all(&mut host, &mut answers);
        Ok(answers)
    }

    fn launch(&self, round: &Round, exchange: &Exchange) -> Result<(), Error> {
        let params = Samples {
            jobs: exchange.words.address(),
            best: self.best.address(),
            sums: self.sums.address(),
            bins: self.bins.address(),
            progress: self.progress.address(),
            candidates: self.candidates.address(),
            out: exchange.out.address(),
            vocabulary: self.vocabulary as u32,
            padding: 0,
        };
        let jobs = round.jobs.len() as u32;
        let sliced = |name| {
            // SAFETY: there are at most MAX_JOBS jobs; their rows, words and records lie in these buffers and in those of
            // the step; the plan was checked for ids beyond the vocabulary.
            unsafe { self.device.launch(name, [SLICES as u32, jobs, 1], THREADS, 0, &params) }
        };
        if round.jobs.iter().any(is_changed) {
            sliced("modify")?;
        }
        sliced("survey")?;
        if round.jobs.iter().any(is_sorted) {
            sliced("collect")?;
        }
        // SAFETY: as above; a block sorts up to CAPACITY places in shared memory.
        unsafe { self.device.launch("draw", [jobs, 1, 1], DRAWERS, CAPACITY * 8, &params)? };
        if round.jobs.iter().any(|job| job.kind == DISTRIBUTION) {
            sliced("rank")?;
        }
        Ok(())
    }

    /// What was drawn; what did not go on the device is to be done on the host.
    fn token<'a>(
        &self,
        exchange: &Exchange,
        drawn: &Job,
        distribution: Option<&Job>,
        sampling: &'a Sampling,
        row: &mut Pinned,
    ) -> Result<Drawn<'a>, Error> {
        let wanted = sampling.logprobs.as_ref();
        let processed = wanted.filter(|wanted| wanted.processed);
        let again = exchange.failed(drawn)
            || (processed.is_some() && distribution.is_some_and(|d| exchange.failed(d)));
        if again {
            let logits = self.logits(drawn.logits, row)?.to_vec();
            // The rank that was found is another token's.
            let raw = match (distribution, wanted, processed) {
                (Some(job), Some(wanted), None) => Some((self.logits(job.logits, row)?.to_vec(), wanted)),
                _ => None,
            };
            // Mask, biases and penalties are in the logits already.
            let plain = Sampling { mask: None, bias: Vec::new(), penalties: None, ..sampling.clone() };
            let sampling = Sampling { logprobs: processed.cloned(), ..plain };
            return Ok(Drawn::ByHost(HostDraw { logits, sampling, raw }));
        }
        let token = exchange.record(drawn).token;
        let logprobs = match (wanted, processed) {
            (Some(wanted), Some(_)) => {
                let of = distribution.unwrap_or(drawn);
                Some(self.logprobs(exchange, of, token, wanted.top, &wanted.ids))
            }
            (Some(wanted), None) => {
                let job = distribution.expect("raw log-probabilities have a job");
                Some(self.score(exchange, job, token, wanted.top, &wanted.ids, row)?)
            }
            (None, _) => None,
        };
        Ok(Drawn::Token(Sampled { token, logprobs }))
    }

    fn score(
        &self,
        exchange: &Exchange,
        job: &Job,
        token: u32,
        top: usize,
        ids: &[u32],
        row: &mut Pinned,
    ) -> Result<TokenLogprobs, Error> {
        match exchange.failed(job) {
            true => Ok(score(self.logits(job.logits, row)?, token, top, ids)),
            false => Ok(self.logprobs(exchange, job, token, top, ids)),
        }
    }

    /// From the record of a job.
    fn logprobs(&self, exchange: &Exchange, job: &Job, token: u32, top: usize, ids: &[u32]) -> TokenLogprobs {
        let record = exchange.record(job);
        let log_sum = log_sum(record.largest, record.sum);
        let logprob = |value: f32| (f64::from(value) - log_sum) as f32;
        let list = &exchange.out_host.slice::<u32>()[job.out as usize + RECORD..];
        let value = |bits: &u32| logprob(f32::from_bits(*bits));
        let top = match ids {
            [] => {
                let pairs = list[..2 * record.count as usize].chunks_exact(2);
                let mut best: Vec<(u32, f32)> = pairs.map(|pair| (pair[0], value(&pair[1]))).collect();
                let missing = top.min(self.vocabulary) - best.len();
                if missing > 0 {
                    // What cannot be drawn comes last, the lower id first.
                    let found: HashSet<u32> = best.iter().map(|&(id, _)| id).collect();
                    let others = (0..self.vocabulary as u32).filter(|id| !found.contains(id));
                    best.extend(others.take(missing).map(|id| (id, f32::NEG_INFINITY)));
                }
                best
            }
            ids => ids.iter().zip(list).map(|(&id, bits)| (id, value(bits))).collect(),
        };
        TokenLogprobs { token, logprob: logprob(record.own), rank: 1 + record.above as usize, top }
    }

    /// A row of the device.
    fn logits<'a>(&self, from: Address, row: &'a mut Pinned) -> Result<&'a mut [f32], Error> {
        let bytes = self.vocabulary * 4;
        // SAFETY: a job's row.
        unsafe { self.device.download(from, row, bytes)? };
        self.device.synchronize()?;
        Ok(&mut row.slice_mut()[..self.vocabulary])
    }
}

/// What became of a token.
enum Drawn<'a> {
    Token(Sampled),
    ByHost(HostDraw<'a>),
}

/// A draw that did not go on the device, with its rows.
struct HostDraw<'a> {
    logits: Vec<f32>,
    sampling: Sampling,
    /// Whose log-probabilities are wanted in place of those of what is drawn from.
    raw: Option<(Vec<f32>, &'a Logprobs)>,
}

impl HostDraw<'_> {
    fn draw(mut self) -> Sampled {
        let mut sampled = sample(&mut self.logits, &self.sampling);
        if let Some((logits, wanted)) = self.raw {
            sampled.logprobs = Some(score(&logits, sampled.token, wanted.top, &wanted.ids));
        }
        sampled
    }
}

/// Draws each on a thread of its own, to its place.
fn draw_all(draws: &mut Vec<(usize, HostDraw<'_>)>, answers: &mut [Sampled]) {
    if draws.len() == 1 {
        draws.drain(..).for_each(|(place, draw)| answers[place] = draw.draw());
        return;
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            draws.drain(..).map(|(place, draw)| (place, scope.spawn(move || draw.draw()))).collect();
        for (place, thread) in threads {
            answers[place] = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

impl Wanted<'_> {
    /// Whether there is a job for a distribution beside one that draws.
    fn has_distribution(&self) -> bool {
        match self {
            Wanted::Score { .. } => false,
            Wanted::Token { sampling, .. } => {
                sampling.logprobs.as_ref().is_some_and(|wanted| !wanted.processed || !has_head(sampling))
            }
        }
    }

    /// Whether a row is changed, but its raw logits are needed after the draw.
    fn is_copied(&self) -> bool {
        match self {
            Wanted::Score { .. } => false,
            Wanted::Token { sampling, kept, .. } => {
                let raw = |wanted: &Logprobs| !wanted.processed;
                is_modified(sampling) && (*kept || sampling.logprobs.as_ref().is_some_and(raw))
            }
        }
    }
}

/// Jobs and the words that they point to, by offset until the words have an address.
#[derive(Default)]
pub(crate) struct Round {
    jobs: Vec<Job>,
    words: Vec<u32>,
    out_words: usize,
}

impl Round {
    fn push(&mut self, mut job: Job, ids: &[u32]) -> u32 {
        job.out = self.out_words as u32;
        job.id_count = ids.len() as u32;
        job.ids = self.append(ids);
        // Beyond the capacity the job fails; an even number keeps records aligned.
        let list = if ids.is_empty() { 2 * (job.top as usize).min(CAPACITY) } else { ids.len() };
        self.out_words += RECORD + list.next_multiple_of(2);
        self.jobs.push(job);
        job.out
    }

    /// A job that draws, and one for the distribution where that is another.
    fn push_token(&mut self, mut job: Job, raw: Job, sampling: &Sampling) {
        if let Some(mask) = &sampling.mask {
            let words = mask.wait();
            (job.mask, job.mask_words) = (self.append(words), words.len() as u32);
            // An empty mask forbids all, too.
            if words.is_empty() {
                (job.mask, job.mask_words) = (self.append(&[0]), 1);
            }
        }
        let mut biases = sampling.bias.clone();
        biases.sort_by_key(|&(token, _)| token);
        job.bias_count = biases.len() as u32;
        job.biases = self
            .append(&biases.iter().flat_map(|&(token, bias)| [token, bias.to_bits()]).collect::<Vec<_>>());
        if let Some(penalties) = &sampling.penalties {
            let seen: Vec<u32> = penalties.seen().flat_map(|(token, count)| [token, count]).collect();
            job.seen_count = seen.len() as u32 / 2;
            job.seen = self.append(&seen);
            (job.repetition, job.frequency, job.presence) =
                (penalties.repetition, penalties.frequency, penalties.presence);
        }
        job.temperature = sampling.temperature.max(0.0);
        if job.temperature > 0.0 {
            job.top_k = sampling.top_k.min(u32::MAX as usize) as u32;
            (job.top_p, job.min_p) = (sampling.top_p, sampling.min_p);
        }
        job.kind = DRAW;
        job.random = random(sampling.seed, sampling.position);
        let Some(wanted) = &sampling.logprobs else {
            self.push(job, &[]);
            return;
        };
        let top = wanted.top.min(u32::MAX as usize) as u32;
        if wanted.processed && has_head(sampling) {
            self.push(Job { kind: DRAW_PROCESSED, top, ..job }, &wanted.ids);
            return;
        }
        let token_from = self.push(job, &[]);
        let of = if wanted.processed {
            let temperature = if job.temperature > 0.0 { job.temperature } else { 1.0 };
            Job { logits: job.logits, largest: job.largest, temperature, min_p: job.min_p, ..raw }
        } else {
            raw
        };
        self.push(Job { kind: DISTRIBUTION, top, token_from, ..of }, &wanted.ids);
    }

    /// Bytes of the jobs and the words behind them.
    fn word_bytes(&self) -> usize {
        size_of_val(&self.jobs[..]) + 4 * self.words.len()
    }

    /// The offset in bytes of words that begin at an even one.
    fn append(&mut self, words: &[u32]) -> Address {
        self.words.resize(self.words.len().next_multiple_of(2), 0);
        let at = 4 * self.words.len() as u64;
        self.words.extend_from_slice(words);
        at
    }

    /// Now that the words lie at `base`.
    fn point(&mut self, base: Address) {
        for job in &mut self.jobs {
            job.mask = if job.mask_words > 0 { base + job.mask } else { 0 };
            (job.biases, job.seen, job.ids) = (base + job.biases, base + job.seen, base + job.ids);
        }
    }
}

/// Whether the most probable tokens are wanted in their order: `Job::sorted` of sampling.cu.
fn is_sorted(job: &Job) -> bool {
    match job.kind {
        DISTRIBUTION => job.top > 0 && job.id_count == 0,
        _ => job.temperature > 0.0 && (job.top_k > 0 || (job.top_p > 0.0 && job.top_p < 1.0)),
    }
}

/// `Job::modified` of sampling.cu.
fn is_changed(job: &Job) -> bool {
    job.mask != 0 || job.bias_count > 0 || job.seen_count > 0
}

fn is_modified(sampling: &Sampling) -> bool {
    sampling.mask.is_some()
        || !sampling.bias.is_empty()
        || sampling.penalties.as_ref().is_some_and(|penalties| penalties.seen().next().is_some())
}

/// Whether the host's sampler sorts the most probable tokens.
fn has_head(sampling: &Sampling) -> bool {
    sampling.temperature > 0.0 && (sampling.top_k > 0 || (sampling.top_p > 0.0 && sampling.top_p < 1.0))
}
