//! The writer: streams weights into a folder that appears under its name only when it is complete.
//!
//! The work is a list of items, one matrix of a stack or one vector each, whose places in the files are known before
//! the first byte is written. Items go to `OUT.partial/`, a journal there says which are done, and a second call with the same
//! plan continues. At the end the folder is renamed.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use half::bf16;
use numerics::{e4m3, nvfp4};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::layout::{self, Role, Slot};
use crate::quantization::Description;
use crate::reader::{FAKE_FOLDER, FAKE_SCALES, INDEX, SINGLE, read_file};
use crate::transpose::transpose;
use crate::unfinished::{JOURNAL, Unfinished, hex, refuse_foreign, remove_unfinished};
use crate::{
    Checkpoint, Config, Error, Format, GenerationConfig, KvCache, Layout, Matrix, MatrixId, MatrixKind,
    Values, Vector, VectorId, VectorKind, Weights, matrices,
};

/// What to write.
#[derive(Debug, Clone)]
pub struct Target {
    /// Any layout but [`Layout::Original`].
    pub layout: Layout,
    /// A new tensor file is begun before one would grow beyond this.
    pub shard_bytes: u64,
    /// `config.json` of the source; its description of quantization is replaced.
    pub config: Value,
    /// Other files of the folder: names and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// The version in the producer's description.
    pub version: String,
    /// The key/value cache that readers are asked to use, where the layout has a name for it. Scales are written where the weights have
    /// them.
    pub kv_cache: Option<KvCache>,
    /// One global scale per expert instead of one per stack.
    pub scales_per_expert: bool,
    /// Stands for source and options: unfinished work is continued only under the same.
    pub fingerprint: String,
    /// Whether an existing checkpoint, or unfinished work of another call, is replaced.
    pub overwrite: bool,
}

impl Target {
    /// A target that takes configuration, tokenizer and the like from a source folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] if one of those files cannot be read.
    pub fn like(source: &Checkpoint, layout: Layout) -> Result<Target, Error> {
        let mut files = Vec::new();
        for name in COMPANIONS {
            let path = source.directory().join(name);
            let contents = read_file(&path, MAX_COMPANION_BYTES)?;
            files.extend(contents.map(|contents| (name.to_owned(), contents)));
        }
        // OpenAI's own folders say nowhere where an answer ends.
        if source.layout() == Layout::Original && !files.iter().any(|(name, _)| name == COMPANIONS[0]) {
            files.extend(GenerationConfig::published(source.config()));
        }
        Ok(Target { files, kv_cache: source.kv_cache(), ..Target::new(source.config_json().clone(), layout) })
    }

    /// A target with the usual size of shards and nothing beside the tensors.
    pub fn new(config: Value, layout: Layout) -> Target {
        Target {
            layout,
            shard_bytes: 5_000_000_000,
            config,
            files: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kv_cache: None,
            scales_per_expert: false,
            fingerprint: String::new(),
            overwrite: false,
        }
    }
}

/// The files that belong to a model beside its tensors and their configuration.
const COMPANIONS: [&str; 5] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// As much as the tokenizer reads. The published `tokenizer.json` of gpt-oss has 27 million.
const MAX_COMPANION_BYTES: u64 = 256 << 20;

/// How far the writer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor that comes next.
    pub tensor: &'a str,
    /// Bytes of tensors that are written, those of an earlier call included.
    pub done_bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The folder.
    pub directory: PathBuf,
    /// Its files, by paths inside the folder.
    pub files: Vec<String>,
    /// Bytes of all stored tensors.
    pub tensor_bytes: u64,
    /// Of these, bytes that an earlier, interrupted call had written.
    pub resumed_bytes: u64,
}

/// Writes `weights` to the folder `out`.
///
/// Every matrix is asked for once, in order, and given back before the next: the memory in use is that of one matrix (of one
/// expert) in its source's and its target's form. `progress` is called before each; `Break` ends the work with
/// [`Error::Interrupted`], and the same call continues it.
///
/// # Errors
/// Before any work: [`Error::Exists`], and [`Error::Format`] for a matrix that the layout cannot hold. [`Error::Io`] with the file's
/// name if the machine fails; what was done then stays in `OUT.partial/`, and `out` is untouched.
pub fn write(
    weights: &dyn Weights,
    target: &Target,
    out: &Path,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Written, Error> {
    may_write(out, target.overwrite)?;
    let (partial, aside) = (beside(out, ".partial")?, beside(out, REPLACED)?);
    let exists = fs::symlink_metadata(out).is_ok() && !is_empty(out);

    let plan = Plan::new(weights, target)?;
    let parent = parent(out);
    fs::create_dir_all(parent).map_err(Error::io(parent))?;
    let mut work = Work::begin(&plan, &partial, target.overwrite)?;
    let result = work.run(weights, &plan, progress);
    // After a failure too: what is done need not be done again. Its own failure adds nothing to the first.
    let journaled = work.commit();
    result.and(journaled)?;
    let files = work.finish(&plan)?;

    if exists {
        // What an earlier call replaced and did not get to delete.
        remove_unfinished(&aside)?;
        // The journal says that the folder may be deleted, if not by this call then by the next.
        let journal = out.join(JOURNAL);
        File::create(&journal).map_err(Error::io(&journal))?;
        fs::rename(out, &aside).map_err(Error::io(out))?;
    }
    fs::rename(&partial, out).map_err(Error::io(out))?;
    // Only now: without it nobody would continue a call that ended here.
    let journal = out.join(JOURNAL);
    fs::remove_file(&journal).map_err(Error::io(&journal))?;
    sync_folder(parent)?;
    remove_unfinished(&aside)?;
    let directory = out.to_owned();
    Ok(Written { directory, files, tensor_bytes: plan.total_bytes, resumed_bytes: work.resumed_bytes })
}

/// Whether [`write`] would begin, which a caller can ask before long work.
///
/// # Errors
/// Those of [`may_write`]; [`Error::Format`] for a matrix that the layout cannot hold; [`Error::OtherWork`] for unfinished work of
/// another call without `overwrite`.
pub fn may_begin(weights: &dyn Weights, target: &Target, out: &Path) -> Result<(), Error> {
    may_write(out, target.overwrite)?;
    Unfinished::check(&beside(out, ".partial")?, &Plan::new(weights, target)?.identity, target.overwrite)
}

/// Whether [`write`] may write to `out`, as far as can be said without any weights.
///
/// # Errors
/// [`Error::Exists`] for a model folder without `overwrite`; [`Error::File`] for anything else that is there or in the way.
pub fn may_write(out: &Path, overwrite: bool) -> Result<(), Error> {
    refuse_foreign(&beside(out, ".partial")?)?;
    refuse_foreign(&beside(out, REPLACED)?)?;
    // By its name alone: with a slash at the end it would be what a link leads to.
    let Ok(there) = fs::symlink_metadata(beside(out, "")?) else { return Ok(()) };
    if there.is_symlink() {
        return Err(Error::file(out, "nothing there, or a model folder to replace", "a link"));
    }
    // The finished model takes the place of what is there, which no rename does on the root of another file system.
    if fs::metadata(parent(out)).is_ok_and(|parent| parent.dev() != there.dev()) {
        let expected = "a folder that a model can take the place of";
        return Err(Error::file(out, expected, "the root of a file system (a folder inside it would do)"));
    }
    if is_empty(out) {
        return Ok(());
    }
    if !is_model(out) {
        return Err(Error::file(out, "nothing there, or a model folder to replace", "something else"));
    }
    if !overwrite {
        return Err(Error::Exists { path: out.to_owned() });
    }
    if let Some(inner) = foreign_folder(out)? {
        return Err(Error::file(&inner, "no folder of other files in a model that is replaced", "one"));
    }
    Ok(())
}

/// The folder around a path.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Whether this is a folder with nothing in it, which is as good as none.
fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

fn is_model(folder: &Path) -> bool {
    let mut entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let weights =
        entries.any(|entry| Path::new(&entry.file_name()).extension() == Some("safetensors".as_ref()));
    weights && folder.join("config.json").is_file()
}

/// A folder inside a model folder that is no part of the model, such as a trainer's checkpoints.
fn foreign_folder(model: &Path) -> Result<Option<PathBuf>, Error> {
    for entry in fs::read_dir(model).map_err(Error::io(model))? {
        let entry = entry.map_err(Error::io(model))?;
        if entry.file_name() != FAKE_FOLDER && entry.file_type().map_err(Error::io(&entry.path()))?.is_dir() {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// The path beside `out` whose name goes on with `suffix`: where unfinished work lies.
///
/// # Errors
/// [`Error::File`] if `out` has no name.
pub fn beside(out: &Path, suffix: &str) -> Result<PathBuf, Error> {
    let name = out.file_name().ok_or_else(|| Error::file(out, "the name of a folder to write", "none"))?;
    let mut name = name.to_owned();
    name.push(suffix);
    Ok(out.with_file_name(name))
}

/// Where a model that is replaced lies until the new one is in its place.
const REPLACED: &str = ".replaced";

/// Everything about the output that is known before the first byte is written.
struct Plan {
    layout: Layout,
    units: Vec<Unit>,
    files: Vec<PlannedFile>,
    /// Names and contents of what is not tensors.
    documents: Vec<(String, Vec<u8>)>,
    total_bytes: u64,
    /// Stands for all of the above and the caller's fingerprint.
    identity: String,
}

/// A logical tensor.
struct Unit {
    name: String,
    what: What,
    /// 1, or the number of experts.
    items: usize,
    parts: Vec<Part>,
}

#[derive(Clone, Copy)]
enum What {
    Matrix(MatrixId),
    Vector(VectorId),
    Cache(usize),
}

/// A stored tensor and its place.
struct Part {
    role: Role,
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    file: usize,
    /// Of the first byte, from the beginning of the file.
    start: u64,
    bytes: u64,
}

struct PlannedFile {
    name: String,
    header: Vec<u8>,
    /// Header included.
    bytes: u64,
}

impl Unit {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    fn key(&self, item: usize) -> String {
        format!("{} {item}", self.name)
    }
}

impl Plan {
    fn new(weights: &dyn Weights, target: &Target) -> Result<Plan, Error> {
        let (layout, config) = (target.layout, weights.config());
        if layout == Layout::Original {
            return Err(Error::field(OUTPUT, "layout", "one of Hugging Face's", layout.name()));
        }
        let config_json = output_config(target, config)?;
        let activations = activations(weights, layout)?;
        let mut units = Vec::new();
        for what in tensors(config) {
            units.extend(unit(weights, target, what, activations)?);
        }

        let mut files = place(layout, &mut units, target.shard_bytes);
        let total_bytes = units.iter().map(Unit::bytes).sum();
        headers(&mut files, &mut units);

        let mut plan =
            Plan { layout, units, files, documents: Vec::new(), total_bytes, identity: String::new() };
        plan.describe(weights, target, config_json, activations)?;
        let mut hash = Sha256::new();
        for part in [target.fingerprint.as_bytes(), layout.name().as_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        for file in &plan.files {
            hash.update(&file.name);
            hash.update(&file.header);
        }
        plan.identity = hex(&hash.finalize());
        Ok(plan)
    }

    /// Makes the JSON documents and takes over the companions.
    fn describe(
        &mut self,
        weights: &dyn Weights,
        target: &Target,
        mut config_json: Map<String, Value>,
        activations: bool,
    ) -> Result<(), Error> {
        let format = |id| written_format(weights, self.layout, id);
        let description = Description {
            layout: self.layout,
            config: weights.config(),
            format: &format,
            activations,
            kv_cache: target.kv_cache,
            version: &target.version,
        };
        if let Some(quantization) = description.quantization_config() {
            config_json.insert("quantization_config".to_owned(), quantization);
        }
        self.documents.push(("config.json".to_owned(), pretty(&Value::Object(config_json))));
        if let Some(document) = description.hf_quant_config() {
            let name = "hf_quant_config.json";
            let name = match self.layout {
                Layout::FakeBf16 => format!("{FAKE_FOLDER}/{name}"),
                _ => name.to_owned(),
            };
            self.documents.push((name, pretty(&document)));
        }
        let shards = self.files.iter().filter(|file| !file.name.contains('/')).count();
        if shards > 1 {
            let mut map = Map::new();
            let mut total_size = 0;
            for part in self.units.iter().flat_map(|unit| &unit.parts).filter(|part| part.file < shards) {
                map.insert(part.name.clone(), json!(self.files[part.file].name));
                total_size += part.bytes;
            }
            map.sort_keys();
            let index = json!({"metadata": {"total_size": total_size}, "weight_map": map});
            self.documents.push((INDEX.to_owned(), pretty(&index)));
        }
        for (name, contents) in &target.files {
            let plain = Path::new(name).file_name() == Some(name.as_ref());
            let taken = self.documents.iter().any(|(other, _)| other == name)
                || self.files.iter().any(|file| file.name == *name);
            if !plain || taken || name == JOURNAL || name.ends_with(".safetensors") {
                let expected = "names of files that are not written anyway";
                return Err(Error::field(OUTPUT, "files", expected, name));
            }
            self.documents.push((name.clone(), contents.clone()));
        }
        Ok(())
    }
}

/// How the output is called in messages about what was asked for.
const OUTPUT: &str = "the output";

/// Every logical tensor in the order of the forward pass, layer by layer.
fn tensors(config: &Config) -> impl Iterator<Item = What> {
    let layers = (0..config.layer_kinds.len()).flat_map(|layer| {
        let vectors = VectorKind::LAYER.map(|kind| What::Vector(kind.at(layer)));
        let matrices = MatrixKind::LAYER.map(|kind| What::Matrix(kind.at(layer)));
        vectors.into_iter().chain(matrices).chain([What::Cache(layer)])
    });
    std::iter::once(What::Matrix(MatrixKind::Embedding.at(0)))
        .chain(layers)
        .chain([What::Vector(VectorKind::FinalNorm.at(0)), What::Matrix(MatrixKind::Unembedding.at(0))])
}

/// The source's configuration in Hugging Face's spelling, without its quantization.
fn output_config(target: &Target, config: &Config) -> Result<Map<String, Value>, Error> {
    let mut value = match target.config.get("num_local_experts") {
        Some(_) => target.config.clone(),
        None => config.to_json(),
    };
    let (stated, _) = Config::from_value(&value)?;
    if stated != *config {
        return Err(Error::field(OUTPUT, "config", "the configuration of the weights", "another"));
    }
    match value.as_object_mut() {
        Some(fields) => {
            fields.shift_remove("quantization_config");
            // What is not packed is written in BF16, whatever the source has.
            for name in ["dtype", "torch_dtype"] {
                fields.entry(name).and_modify(|dtype| *dtype = json!("bfloat16"));
            }
            Ok(std::mem::take(fields))
        }
        None => unreachable!("a configuration was just read from this value, so it is an object"),
    }
}

/// Whether the packed matrices that have inputs have the scales of these: all of them or none.
fn activations(weights: &dyn Weights, layout: Layout) -> Result<bool, Error> {
    let packed =
        || matrices(weights.config()).filter(|&id| written_format(weights, layout, id) == Format::Nvfp4);
    let wants_packed = matches!(layout, Layout::ModelOpt | Layout::CompressedTensors | Layout::FakeBf16);
    if wants_packed && packed().next().is_none() {
        return Err(Error::Format {
            tensor: MatrixKind::GateUp.at(0).name(),
            expected: format!("at least one matrix in nvfp4 for the layout {}", layout.name()),
            found: "none".to_owned(),
        });
    }
    let mut with_inputs = packed().filter(|id| id.kind.has_inputs());
    let Some(first) = with_inputs.next() else { return Ok(false) };
    let with = |id| weights.input_scale(id).is_some();
    match with_inputs.find(|&id| with(id) != with(first)) {
        None => Ok(with(first)),
        Some(other) => Err(Error::Format {
            tensor: other.name(),
            expected: format!("an input scale exactly if {} has one", first.name()),
            found: if with(other) { "one" } else { "none" }.to_owned(),
        }),
    }
}

/// The format in which a matrix is described to be: for fake quantization NVFP4 where its values are on that grid.
fn written_format(weights: &dyn Weights, layout: Layout, id: MatrixId) -> Format {
    match layout {
        Layout::Bf16 => Format::Bf16,
        // No name for a packed stack exists there.
        Layout::CompressedTensors if id.kind.is_expert() => Format::Bf16,
        Layout::Original | Layout::Mxfp4 if !id.kind.is_expert() => Format::Bf16,
        _ => weights.format(id),
    }
}

/// The stored tensors of a logical one, not yet placed. File 0 stands for the shards, 1 for the fake scales.
fn unit(
    weights: &dyn Weights,
    target: &Target,
    what: What,
    activations: bool,
) -> Result<Option<Unit>, Error> {
    let (layout, config) = (target.layout, weights.config());
    let mut unit = Unit { name: String::new(), what, items: 1, parts: Vec::new() };
    match what {
        What::Matrix(id) => {
            (unit.name, unit.items) = (id.name(), id.kind.shape(config).0);
            let format = written_format(weights, layout, id);
            let fake = layout == Layout::FakeBf16;
            let held = if fake {
                format == Format::Bf16 || Layout::ModelOpt.holds(config, id.kind, format)
            } else {
                layout.holds(config, id.kind, format)
            };
            if !held {
                return Err(Error::Format {
                    tensor: unit.name,
                    expected: format!("a format that the layout {} has for it", layout.name()),
                    found: format.name().to_owned(),
                });
            }
            let stored = if fake { Format::Bf16 } else { format };
            let mut slots = layout::matrix(layout, config, id, stored);
            let main = slots.len();
            if fake && format == Format::Nvfp4 {
                slots.extend(layout::scales(config, id));
            }
            for (index, mut slot) in slots.into_iter().enumerate() {
                if slot.role == Role::InputScale && !(activations && id.kind.has_inputs()) {
                    continue;
                }
                if slot.role == Role::GlobalScale && id.kind.is_expert() && target.scales_per_expert {
                    slot.shape = vec![unit.items];
                }
                unit.parts.push(Part::new(&slot, slot.dtypes[0], usize::from(index >= main)));
            }
        }
        What::Vector(id) => {
            unit.name = id.name();
            let slot = layout::vector(layout, config, id);
            let dtype = match weights.vector(id)? {
                Vector::Bf16(_) => Dtype::BF16,
                Vector::F32(_) => Dtype::F32,
            };
            unit.parts.push(Part::new(&slot, dtype, 0));
        }
        What::Cache(layer) => {
            unit.name = format!("model.layers.{layer}.self_attn");
            let named = target.kv_cache.is_some_and(|kv_cache| layout.names_cache(kv_cache));
            if !named || weights.kv_scales(layer).is_none() {
                return Ok(None);
            }
            let file = usize::from(layout == Layout::FakeBf16);
            let slots = layout::kv_scales(layout, layer);
            unit.parts.extend(slots.iter().map(|slot| Part::new(slot, slot.dtypes[0], file)));
        }
    }
    Ok(Some(unit).filter(|unit| !unit.parts.is_empty()))
}

impl Part {
    fn new(slot: &Slot, dtype: Dtype, file: usize) -> Part {
        let elements: usize = slot.shape.iter().product();
        let bytes = (elements * dtype.bitsize() / 8) as u64;
        Part {
            role: slot.role,
            name: slot.name.clone(),
            dtype,
            shape: slot.shape.clone(),
            file,
            start: 0,
            bytes,
        }
    }
}

/// Gives every part its file. A unit's parts stay together; a shard is closed before it would grow beyond the limit.
fn place(layout: Layout, units: &mut [Unit], shard_bytes: u64) -> Vec<PlannedFile> {
    let (mut shard, mut filled) = (0, 0);
    for unit in &mut *units {
        let bytes: u64 = unit.parts.iter().filter(|part| part.file == 0).map(|part| part.bytes).sum();
        if filled > 0 && bytes > 0 && filled + bytes > shard_bytes {
            (shard, filled) = (shard + 1, 0);
        }
        filled += bytes;
        for part in &mut unit.parts {
            // The number of shards is not known yet: the fake scales get the largest index.
            part.file = if part.file == 0 { shard } else { usize::MAX };
        }
    }
    let shards = shard + 1;
    units.iter_mut().flat_map(|unit| &mut unit.parts).for_each(|part| part.file = part.file.min(shards));
    let shard_name = |shard: usize| match shards {
        1 => SINGLE.to_owned(),
        _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
    };
    let mut names: Vec<String> = (0..shards).map(shard_name).collect();
    if layout == Layout::FakeBf16 {
        names.push(format!("{FAKE_FOLDER}/{FAKE_SCALES}"));
    }
    names.into_iter().map(|name| PlannedFile { name, header: Vec::new(), bytes: 0 }).collect()
}

/// Lays out each file and makes its header, as the reference implementation of safetensors does: wider types first, so that
/// every tensor is aligned, then by name; the header padded to 8 bytes.
fn headers(files: &mut [PlannedFile], units: &mut [Unit]) {
    for (index, file) in files.iter_mut().enumerate() {
        let mut parts: Vec<&mut Part> =
            units.iter_mut().flat_map(|unit| &mut unit.parts).filter(|part| part.file == index).collect();
        parts.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut end = 0;
        let mut tensors = Vec::with_capacity(parts.len());
        for part in &mut parts {
            part.start = end;
            end += part.bytes;
            let data_offsets = (part.start as usize, end as usize);
            tensors.push((
                part.name.clone(),
                TensorInfo { dtype: part.dtype, shape: part.shape.clone(), data_offsets },
            ));
        }
        let format = [("format".to_owned(), "pt".to_owned())].into();
        let metadata =
            Metadata::new(Some(format), tensors).expect("offsets were laid out one after the other");
        let json = serde_json::to_vec(&metadata).expect("metadata is plain JSON");
        let padded = json.len().next_multiple_of(8);
        let mut header = (padded as u64).to_le_bytes().to_vec();
        header.extend(&json);
        header.resize(8 + padded, b' ');
        for part in &mut parts {
            part.start += header.len() as u64;
        }
        file.bytes = header.len() as u64 + end;
        file.header = header;
    }
}

/// The unfinished folder, and what of it is done.
struct Work {
    folder: Unfinished,
    layout: Layout,
    files: Vec<(PathBuf, File)>,
    done: HashSet<String>,
    /// Items that are written but not yet in the journal, and their bytes.
    pending: Vec<String>,
    pending_bytes: u64,
    resumed_bytes: u64,
}

/// The journal is written after so many bytes: what a power cut can cost.
const BYTES_PER_COMMIT: u64 = 256 << 20;

impl Work {
    fn begin(plan: &Plan, directory: &Path, overwrite: bool) -> Result<Work, Error> {
        let (mut folder, mut done) = Unfinished::begin(directory, &plan.identity, overwrite)?;
        // What the journal says of a file that someone else removed is no longer true.
        if !done.is_empty() && !plan.files.iter().all(|file| directory.join(&file.name).exists()) {
            folder.begin_anew(&plan.identity)?;
            done.clear();
        }
        let mut files = Vec::new();
        for file in &plan.files {
            let path = directory.join(&file.name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(Error::io(parent))?;
            }
            let mut open = OpenOptions::new();
            open.create(true).truncate(false).read(true).write(true);
            let handle = open.open(&path).map_err(Error::io(&path))?;
            handle.write_all_at(&file.header, 0).map_err(Error::io(&path))?;
            files.push((path, handle));
        }
        Ok(Work {
            folder,
            layout: plan.layout,
            files,
            done: done.into_iter().collect(),
            pending: Vec::new(),
            pending_bytes: 0,
            resumed_bytes: 0,
        })
    }

    fn run(
        &mut self,
        weights: &dyn Weights,
        plan: &Plan,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut done_bytes = 0;
        for unit in &plan.units {
            let bytes = unit.bytes();
            for item in 0..unit.items {
                // Exact in sum: the last item takes the remainder.
                let share =
                    bytes * (item as u64 + 1) / unit.items as u64 - bytes * item as u64 / unit.items as u64;
                let key = unit.key(item);
                if self.done.contains(&key) {
                    self.resumed_bytes += share;
                } else {
                    let at = Progress { tensor: &unit.name, done_bytes, total_bytes: plan.total_bytes };
                    if progress(at).is_break() {
                        return Err(Error::Interrupted { partial: self.folder.directory().to_owned() });
                    }
                    self.item(weights, unit, item)?;
                    self.pending.push(key);
                    self.pending_bytes += share;
                    if self.pending_bytes >= BYTES_PER_COMMIT {
                        self.commit()?;
                    }
                }
                done_bytes += share;
            }
        }
        Ok(())
    }

    fn item(&self, weights: &dyn Weights, unit: &Unit, item: usize) -> Result<(), Error> {
        match unit.what {
            What::Matrix(id) => {
                let matrix = weights.matrix(id, item)?;
                let expected = weights.format(id);
                let (_, rows, cols) = id.kind.shape(weights.config());
                if (matrix.values.format(), matrix.rows, matrix.cols) != (expected, rows, cols) {
                    return Err(Error::Format {
                        tensor: unit.name.clone(),
                        expected: format!("{rows} × {cols} in {}", expected.name()),
                        found: format!(
                            "{} × {} in {}",
                            matrix.rows,
                            matrix.cols,
                            matrix.values.format().name()
                        ),
                    });
                }
                matrix.values.check_scales(&unit.name)?;
                for part in &unit.parts {
                    self.matrix_part(weights, unit, part, id, item, &matrix)?;
                }
                drop(matrix);
                weights.release(id, item);
                Ok(())
            }
            What::Vector(id) => {
                let vector = weights.vector(id)?;
                let bytes: &[u8] = match &vector {
                    Vector::Bf16(values) => bytemuck::cast_slice(values),
                    Vector::F32(values) => bytemuck::cast_slice(values),
                };
                assert_eq!(
                    bytes.len() as u64,
                    unit.parts[0].bytes,
                    "a vector has its length and keeps its type"
                );
                self.put(&unit.parts[0], 0, bytes)
            }
            What::Cache(layer) => {
                let scales =
                    weights.kv_scales(layer).expect("the plan has scales only where the weights have them");
                for part in &unit.parts {
                    let scale = if part.role == Role::KeyScale { scales.key } else { scales.value };
                    self.put_scale(part, 0, scale, false)?;
                }
                Ok(())
            }
        }
    }

    fn matrix_part(
        &self,
        weights: &dyn Weights,
        unit: &Unit,
        part: &Part,
        id: MatrixId,
        item: usize,
        matrix: &Matrix<'_>,
    ) -> Result<(), Error> {
        let transposes = self.layout.transposes(id.kind);
        let inverts = self.layout.inverts_scales();
        let offset = part.bytes / unit.items as u64 * item as u64;
        match (part.role, &matrix.values) {
            (Role::Values, values) => {
                if self.layout == Layout::FakeBf16 {
                    check_recoverable(&unit.name, values)?;
                }
                self.put_bf16(&unit.name, part, offset, matrix, transposes)
            }
            (Role::Codes, Values::Mxfp4 { codes, .. } | Values::Nvfp4 { codes, .. }) => {
                self.put_bytes(part, offset, codes, matrix.rows, transposes)
            }
            (Role::Scales, Values::Mxfp4 { scales, .. } | Values::Nvfp4 { scales, .. }) => {
                self.put_bytes(part, offset, scales, matrix.rows, transposes)
            }
            (Role::GlobalScale, Values::Nvfp4 { global_scale, .. }) => {
                if part.shape == [unit.items] {
                    return self.put_scale(part, 4 * item as u64, *global_scale, inverts);
                }
                if item == 0 {
                    return self.put_scale(part, 0, *global_scale, inverts);
                }
                // Read back rather than remembered: the first may be an earlier call's work.
                let first = self.scale(part)?;
                if first != *global_scale {
                    return Err(Error::Format {
                        tensor: unit.name.clone(),
                        expected: format!("one global scale for all experts, {first}"),
                        found: format!("{global_scale} for expert {item}"),
                    });
                }
                Ok(())
            }
            (Role::InputScale, _) if item == 0 => {
                let scale =
                    weights.input_scale(id).expect("the plan has input scales only where all weights do");
                self.put_scale(part, 0, scale, inverts)
            }
            (Role::InputScale, _) => Ok(()),
            (role, values) => {
                unreachable!("{}: no {role:?} in a matrix of format {}", unit.name, values.format().name())
            }
        }
    }

    /// Writes codes or scales, `rows` rows of equal length.
    fn put_bytes(
        &self,
        part: &Part,
        offset: u64,
        bytes: &[u8],
        rows: usize,
        transposes: bool,
    ) -> Result<(), Error> {
        if !transposes {
            return self.put(part, offset, bytes);
        }
        let mut out = vec![0; bytes.len()];
        transpose(bytes, rows, bytes.len() / rows, &mut out);
        self.put(part, offset, &out)
    }

    /// Writes a matrix's values as BF16.
    fn put_bf16(
        &self,
        name: &str,
        part: &Part,
        offset: u64,
        matrix: &Matrix<'_>,
        transposes: bool,
    ) -> Result<(), Error> {
        let (rows, cols) = (matrix.rows, matrix.cols);
        match (&matrix.values, transposes) {
            (Values::Bf16(values), false) => self.put(part, offset, bytemuck::cast_slice(values)),
            (Values::Bf16(values), true) => {
                let mut out = vec![bf16::ZERO; values.len()];
                transpose(values, rows, cols, &mut out);
                self.put(part, offset, bytemuck::cast_slice(&out))
            }
            (_, false) => {
                // The embedding of the 20b would take a gigabyte in one piece.
                const ROWS: usize = 256;
                for first in (0..rows).step_by(ROWS) {
                    let band = bf16_rows(name, matrix, first..(first + ROWS).min(rows))?;
                    self.put(part, offset + (first * cols * 2) as u64, bytemuck::cast_slice(&band))?;
                }
                Ok(())
            }
            (_, true) => {
                let values = bf16_rows(name, matrix, 0..rows)?;
                let mut out = vec![bf16::ZERO; values.len()];
                transpose(&values, rows, cols, &mut out);
                self.put(part, offset, bytemuck::cast_slice(&out))
            }
        }
    }

    fn put_scale(&self, part: &Part, offset: u64, scale: f32, inverts: bool) -> Result<(), Error> {
        let stored = if inverts { 1.0 / scale } else { scale };
        if !(stored.is_finite() && stored > 0.0 && scale.is_finite()) {
            return Err(Error::Scale { tensor: part.name.clone(), found: scale.to_string() });
        }
        self.put(part, offset, &stored.to_le_bytes())
    }

    fn scale(&self, part: &Part) -> Result<f32, Error> {
        let (path, file) = &self.files[part.file];
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, part.start).map_err(Error::io(path))?;
        Ok(f32::from_le_bytes(bytes))
    }

    fn put(&self, part: &Part, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        assert!(offset + bytes.len() as u64 <= part.bytes, "{}: written beyond its end", part.name);
        let (path, file) = &self.files[part.file];
        file.write_all_at(bytes, part.start + offset).map_err(Error::io(path))
    }

    /// Makes what is written last, then says so in the journal.
    fn commit(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        for (path, file) in &self.files {
            file.sync_data().map_err(Error::io(path))?;
        }
        self.folder.record(&self.pending)?;
        self.pending.clear();
        self.pending_bytes = 0;
        Ok(())
    }

    /// Completes the folder but for its name, and gives the names of its files.
    fn finish(&self, plan: &Plan) -> Result<Vec<String>, Error> {
        let directory = self.folder.directory();
        for (planned, (path, file)) in plan.files.iter().zip(&self.files) {
            let found = file.metadata().map_err(Error::io(path))?.len();
            if found != planned.bytes {
                // Someone else changed it: by the journal every byte has been written.
                return Err(Error::file(path, format!("{} bytes", planned.bytes), found.to_string()));
            }
            file.sync_all().map_err(Error::io(path))?;
        }
        for (name, contents) in &plan.documents {
            let path = directory.join(name);
            let mut file = File::create(&path).map_err(Error::io(&path))?;
            file.write_all(contents).and_then(|()| file.sync_all()).map_err(Error::io(&path))?;
        }
        if plan.layout == Layout::FakeBf16 {
            sync_folder(&directory.join(FAKE_FOLDER))?;
        }
        sync_folder(directory)?;
        let tensors = plan.files.iter().map(|file| &file.name);
        Ok(tensors.chain(plan.documents.iter().map(|(name, _)| name)).cloned().collect())
    }
}

/// The values of some rows, rounded to BF16.
fn bf16_rows(name: &str, matrix: &Matrix<'_>, rows: std::ops::Range<usize>) -> Result<Vec<bf16>, Error> {
    let mut values = Vec::with_capacity(rows.len() * matrix.cols);
    let mut row_values = vec![0.0; matrix.cols];
    for row in rows {
        matrix.row(row, &mut row_values);
        values.extend(row_values.iter().map(|&value| bf16::from_f32(value)));
        if !values[values.len() - matrix.cols..].iter().all(|value| value.is_finite()) {
            return Err(Error::Format {
                tensor: name.to_owned(),
                expected: "values in the range of BF16".to_owned(),
                found: format!("a larger one in row {row}"),
            });
        }
    }
    Ok(values)
}

/// Refuses NVFP4 values so small that their codes could not be told from their BF16 values.
fn check_recoverable(name: &str, values: &Values<'_>) -> Result<(), Error> {
    let Values::Nvfp4 { codes, scales, global_scale } = values else { return Ok(()) };
    for (block, (codes, &scale)) in codes.chunks_exact(nvfp4::BLOCK / 2).zip(scales.iter()).enumerate() {
        let s = e4m3::decode(scale) * global_scale;
        if s / 2.0 < f32::MIN_POSITIVE && codes.iter().any(|code| code & 0x77 != 0) {
            return Err(Error::Format {
                tensor: name.to_owned(),
                expected: "scales of at least 2^-125, so that codes can be recovered from BF16".to_owned(),
                found: format!("{s:e} at block {block}"),
            });
        }
    }
    Ok(())
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("JSON values print");
    text.push(b'\n');
    text
}

/// Makes the names in a folder last.
///
/// # Errors
/// [`Error::Io`] with the folder's name.
pub fn sync_folder(directory: &Path) -> Result<(), Error> {
    match File::open(directory).and_then(|folder| folder.sync_all()) {
        // Some file systems do not know this of folders.
        Err(error) if !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            Err(Error::io(directory)(error))
        }
        _ => Ok(()),
    }
}
