//! `Checkpoint`: a model folder with every stored tensor claimed and every logical tensor found.

use std::borrow::{Borrow, Cow};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use numerics::nvfp4;
use safetensors::Dtype;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Mismatch, brief};
use crate::layout::{self, Role, Slot};
use crate::transpose::transpose;
use crate::{
    Config, Error, Format, GenerationConfig, Identity, KvCache, KvScales, Layout, Matrix, MatrixId,
    Quantization, StoredTensor, TensorFile, Values, Vector, VectorId, Weights, matrices, vectors,
};

/// A model in files, its weights borrowed from the memory map in the precision that they are stored in.
///
/// Matrices that a layout stores input-major (expert stacks in BF16 and NVFP4) are transposed into memory one expert at a
/// time. Block scales are checked when a matrix is first read, everything else when the folder is opened.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    config: Config,
    config_json: Value,
    generation: GenerationConfig,
    quantization: Option<Quantization>,
    kv_cache: Option<KvCache>,
    warnings: Vec<String>,
    layout: Layout,
    files: Vec<TensorFile>,
    matrices: HashMap<MatrixId, Stack>,
    vectors: HashMap<VectorId, Span>,
    kv_scales: HashMap<usize, KvScales>,
    /// Of a fake-quantized folder: the scales that its values were made with.
    fake: HashMap<MatrixId, Stack>,
}

impl Checkpoint {
    /// Opens a model folder in any of the layouts.
    ///
    /// # Errors
    /// One error for the whole folder: what cannot be read, which field of the configuration is wrong, or which tensors are
    /// missing, unknown or misshapen.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        Checkpoint::open_with(path, &Map::new())
    }

    /// Opens a model folder in whose `config.json` these fields take the place of its own.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn open_with(path: &Path, fields: &Map<String, Value>) -> Result<Checkpoint, Error> {
        let metadata = fs::metadata(path).map_err(Error::io(path))?;
        if !metadata.is_dir() {
            return Err(Error::file(path, "a model folder", "a file"));
        }
        let Some(mut config) = read_json(&path.join("config.json"))? else {
            return Err(Error::file(path, "a model folder", "no config.json in it"));
        };
        if let Value::Object(config) = &mut config {
            config.extend(fields.clone());
        }
        let generation = read_json(&path.join("generation_config.json"))?;
        let hf_quant_config = read_json(&path.join("hf_quant_config.json"))?;
        let fake_folder = path.join(FAKE_FOLDER);
        let fake = if fake_folder.join(FAKE_SCALES).exists() {
            let hf_quant_config = read_json(&fake_folder.join("hf_quant_config.json"))?;
            let quantization =
                hf_quant_config.as_ref().map(Quantization::from_hf_quant_config).transpose()?;
            let kv_cache = quantization.and_then(|quantization| quantization.kv_cache);
            Some((TensorFile::open(&fake_folder.join(FAKE_SCALES))?, kv_cache))
        } else if fake_folder.is_dir() {
            // Without them the values would be taken for plain BF16, and quantized anew.
            let expected = format!("{FAKE_SCALES} in it, the scales that the values were made with");
            return Err(Error::file(&fake_folder, expected, "no such file"));
        } else {
            None
        };
        let files = open_files(path)?;
        Checkpoint::assemble(
            path.to_owned(),
            config,
            generation.as_ref(),
            hf_quant_config.as_ref(),
            files,
            fake,
        )
    }

    /// Opens a model that is in memory (one safetensors file, aligned to 8 bytes so that it need not be copied).
    pub fn from_bytes(
        config_json: &str,
        generation_config_json: &str,
        safetensors: &'static [u8],
    ) -> Result<Checkpoint, Error> {
        let name = Path::new("(built in)");
        let json = |file: &str, text: &str| {
            serde_json::from_str::<Value>(text)
                .map_err(|source| Error::Json { path: name.join(file), source })
        };
        let config = json("config.json", config_json)?;
        let generation = json("generation_config.json", generation_config_json)?;
        let file = TensorFile::from_static(&name.join("model.safetensors"), safetensors)?;
        Checkpoint::assemble(name.to_owned(), config, Some(&generation), None, vec![file], None)
    }

    fn assemble(
        directory: PathBuf,
        config_json: Value,
        generation: Option<&Value>,
        hf_quant_config: Option<&Value>,
        mut files: Vec<TensorFile>,
        fake: Option<(TensorFile, Option<KvCache>)>,
    ) -> Result<Checkpoint, Error> {
        let (config, mut warnings) = Config::from_value(&config_json)?;
        let generation = GenerationConfig::read(generation, &config_json)?;
        if let Some(id) = generation.eos_token_ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            warnings.push(format!("`eos_token_id`: {id} is outside the vocabulary of {}", config.vocab_size));
        }
        let mut quantization = match (Quantization::from_config(&config_json)?, hf_quant_config) {
            (None, Some(value)) => Some(Quantization::from_hf_quant_config(value)?),
            (quantization, _) => quantization,
        };
        // A fine-tune of decoded weights often keeps the description of what they were decoded from.
        if quantization.as_ref().is_some_and(|q| q.layout == Layout::Mxfp4) && plain_experts(&files) {
            quantization = None;
            warnings.push("config.json says mxfp4, the experts are in BF16 and are read as such".to_owned());
        }

        let main_files = files.len();
        let fake_kv_cache = fake.as_ref().and_then(|(_, kv_cache)| *kv_cache);
        let has_fake = fake.is_some();
        files.extend(fake.map(|(file, _)| file));

        let mut ledger = Ledger::new(&directory, &files[..main_files], 0)?;
        let layout = match &quantization {
            Some(quantization) => quantization.layout,
            None => detect(&files[..main_files], has_fake),
        };
        if has_fake && layout != Layout::FakeBf16 {
            return Err(Error::file(
                &directory,
                format!("no `{FAKE_FOLDER}` folder beside {} weights", layout.name()),
                "one",
            ));
        }

        let mut stacks = HashMap::new();
        for id in matrices(&config) {
            let format = stored_format(layout, &config, id, &ledger);
            let slots = layout::matrix(layout, &config, id, format);
            if let Some(stack) = ledger.stack(layout, &config, id, format, &slots)? {
                stacks.insert(id, stack);
            }
        }
        let mut spans = HashMap::new();
        for id in vectors(&config) {
            let slot = layout::vector(layout, &config, id);
            if let Some((span, dtype, _)) = ledger.claim(&slot) {
                let (n, length) = id.kind.shape(&config);
                let element = dtype.bitsize() / 8;
                let start = span.range.start + slot.first_row * element;
                let range = start..start + n * length * element;
                spans.insert(id, Span { dtype, range, ..span });
            }
        }
        let mut kv_scales = HashMap::new();
        if layout != Layout::FakeBf16 {
            ledger.kv_scales(layout, &config, &mut kv_scales)?;
        }
        let ranges = ledger.pass_over_ranges();
        if ranges > 0 {
            warnings.push(format!(
                "{ranges} ranges of Model Optimizer's quantizers (`…_quantizer._amax`) are passed over: the weights are read as they \
                 are"
            ));
        }
        let mut mismatch = ledger.finish();

        let mut fake = HashMap::new();
        if has_fake {
            let mut ledger = Ledger::new(&directory, &files[main_files..], main_files)?;
            for id in matrices(&config) {
                let slots = layout::scales(&config, id);
                let (_, _, cols) = id.kind.shape(&config);
                let packable = layout.packs(id.kind) && cols.is_multiple_of(nvfp4::BLOCK);
                // Which matrices were quantized is what the scales themselves say.
                if packable && slots.iter().any(|slot| ledger.find(slot).is_some()) {
                    let stack = ledger.stack(layout, &config, id, Format::Nvfp4, &slots)?;
                    fake.extend(stack.map(|stack| (id, stack)));
                }
            }
            ledger.kv_scales(layout, &config, &mut kv_scales)?;
            let other = ledger.finish();
            mismatch.missing.extend(other.missing);
            mismatch.unknown.extend(other.unknown);
            mismatch.misshapen.extend(other.misshapen);
        }
        if !mismatch.is_empty() {
            return Err(Error::Tensors { path: directory, mismatch: Box::new(mismatch) });
        }
        let wider = |stack: &&Stack| matches!(stack.values.dtype, Dtype::F32 | Dtype::F16);
        let wide = stacks.values().filter(wider).count();
        if wide > 0 {
            warnings.push(format!("{wide} matrices are in F32 or F16, and are rounded to BF16"));
        }
        // Older exports tell of the cache in their own file alone.
        let kv_cache = fake_kv_cache
            .or(quantization.as_ref().and_then(|quantization| quantization.kv_cache))
            .or(hf_quant_config
                .and_then(|value| Quantization::from_hf_quant_config(value).ok())
                .and_then(|quantization| quantization.kv_cache));
        Ok(Checkpoint {
            directory,
            config,
            config_json,
            generation,
            quantization,
            kv_cache,
            warnings,
            layout,
            files,
            matrices: stacks,
            vectors: spans,
            kv_scales,
            fake,
        })
    }

    /// How the model lies in its files.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The tensor files; of a fake-quantized folder the last is `fake_quant/scales.safetensors`.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// `config.json` as it is, for what [`Config`] does not hold.
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// The defaults of generation.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// What the configuration says about quantization.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }

    /// The key/value cache that the checkpoint asks for.
    pub fn kv_cache(&self) -> Option<KvCache> {
        self.kv_cache
    }

    /// What was read in a way that the files do not state, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The bytes of all stored tensors, headers left out.
    pub fn tensor_bytes(&self) -> u64 {
        self.stored().map(|(_, tensor)| tensor.range.len() as u64).sum()
    }

    /// Every stored tensor with its file.
    pub fn stored(&self) -> impl Iterator<Item = (&TensorFile, &StoredTensor)> {
        self.files.iter().flat_map(|file| file.tensors().iter().map(move |tensor| (file, tensor)))
    }

    /// The number of weights, biases and scales of norms.
    pub fn parameters(&self) -> u64 {
        self.config.parameters()
    }

    /// The name under which a matrix is stored (of several tensors the codes).
    pub fn name_of(&self, id: MatrixId) -> &str {
        &self.stack(id).name
    }

    /// The global scales of an NVFP4 matrix or stack, one or one per expert; of a fake-quantized folder those stored
    /// beside it. Empty for other matrices.
    pub fn global_scales(&self, id: MatrixId) -> &[f32] {
        &self.fake.get(&id).unwrap_or_else(|| self.stack(id)).global_scales
    }

    /// The bytes that a matrix or stack takes in the files, its scales included.
    pub fn matrix_bytes(&self, id: MatrixId) -> u64 {
        let scales = |stack: &Stack| {
            let scalars = stack.global_scales.len() + usize::from(stack.input_scale.is_some());
            stack.scales.as_ref().map_or(0, |scales| scales.range.len()) + 4 * scalars
        };
        let stack = self.stack(id);
        (stack.values.range.len() + scales(stack) + self.fake.get(&id).map_or(0, scales)) as u64
    }

    /// The bytes that a vector, or one per expert, takes in the files.
    pub fn vector_bytes(&self, id: VectorId) -> u64 {
        self.vectors[&id].range.len() as u64
    }

    /// The model with the matrices of a fake-quantized folder in NVFP4, their codes recovered through the stored
    /// scales. Any other model as it is.
    pub fn packed(&self) -> Packed<&Checkpoint> {
        Packed(self)
    }

    /// As [`Checkpoint::packed`], keeping the checkpoint.
    pub fn into_packed(self) -> Packed<Checkpoint> {
        Packed(self)
    }

    fn stack(&self, id: MatrixId) -> &Stack {
        self.matrices.get(&id).expect("every matrix of the model was found when the folder was opened")
    }

    /// The bytes of one expert's part of a span.
    fn part(&self, span: &Span, stack: &Stack, expert: usize) -> &[u8] {
        self.files[span.file].slice(&stack.range(span, expert))
    }

    /// One expert's `rows × width` bytes (codes or scales) in the logical orientation.
    fn bytes(&self, span: &Span, stack: &Stack, expert: usize) -> Cow<'_, [u8]> {
        let stored = self.part(span, stack, expert);
        if !stack.transposed {
            return Cow::Borrowed(stored);
        }
        let mut out = vec![0; stored.len()];
        transpose(stored, stored.len() / stack.rows, stack.rows, &mut out);
        Cow::Owned(out)
    }

    fn check(&self, stack: &Stack, values: &Values<'_>, expert: usize) -> Result<(), Error> {
        if !stack.checked[expert].load(Ordering::Relaxed) {
            values.check_scales(&stack.name)?;
            stack.checked[expert].store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Weights for Checkpoint {
    fn config(&self) -> &Config {
        &self.config
    }

    fn format(&self, id: MatrixId) -> Format {
        self.stack(id).format
    }

    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        let stack = self.stack(id);
        let values = match (stack.format, &stack.scales) {
            (Format::Bf16, _) => Values::Bf16(if stack.transposed {
                let stored = rounded(self.part(&stack.values, stack, expert), stack.values.dtype);
                let mut out = vec![bf16::ZERO; stored.len()];
                transpose(&stored, stack.cols, stack.rows, &mut out);
                Cow::Owned(out)
            } else {
                rounded(self.part(&stack.values, stack, expert), stack.values.dtype)
            }),
            (Format::Mxfp4, Some(scales)) => Values::Mxfp4 {
                codes: self.bytes(&stack.values, stack, expert),
                scales: self.bytes(scales, stack, expert),
            },
            (Format::Nvfp4, Some(scales)) => Values::Nvfp4 {
                codes: self.bytes(&stack.values, stack, expert),
                scales: self.bytes(scales, stack, expert),
                global_scale: stack.global_scale(expert),
            },
            (Format::Mxfp4 | Format::Nvfp4, None) => {
                unreachable!("the table names scales for every packed matrix")
            }
        };
        self.check(stack, &values, expert)?;
        Ok(Matrix { rows: stack.rows, cols: stack.cols, values })
    }

    fn by_inputs(&self, id: MatrixId, expert: usize) -> Result<Option<Values<'_>>, Error> {
        let stack = self.stack(id);
        let Some(scales) = stack.scales.as_ref().filter(|_| stack.transposed) else { return Ok(None) };
        let part = |span| Cow::Borrowed(self.part(span, stack, expert));
        let (codes, scales) = (part(&stack.values), part(scales));
        let values = match stack.format {
            Format::Bf16 => return Ok(None),
            Format::Mxfp4 => Values::Mxfp4 { codes, scales },
            Format::Nvfp4 => Values::Nvfp4 { codes, scales, global_scale: stack.global_scale(expert) },
        };
        self.check(stack, &values, expert)?;
        Ok(Some(values))
    }

    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        let span =
            self.vectors.get(&id).expect("every vector of the model was found when the folder was opened");
        let bytes = self.files[span.file].slice(&span.range);
        Ok(match span.dtype {
            Dtype::F32 => Vector::F32(elements(bytes)),
            Dtype::F16 => Vector::F32(elements::<f16>(bytes).iter().map(|value| value.to_f32()).collect()),
            _ => Vector::Bf16(elements(bytes)),
        })
    }

    fn input_scale(&self, id: MatrixId) -> Option<f32> {
        self.stack(id).input_scale
    }

    fn kv_scales(&self, layer: usize) -> Option<KvScales> {
        self.kv_scales.get(&layer).copied()
    }

    fn identity(&self) -> Option<Identity> {
        let mut digest = Sha256::new_with_prefix(self.config_json.to_string());
        self.files.iter().for_each(|file| file.identify(&mut digest));
        Some(Identity(digest.finalize().into()))
    }

    fn release(&self, id: MatrixId, expert: usize) {
        let stack = self.stack(id);
        for span in std::iter::once(&stack.values).chain(&stack.scales) {
            self.files[span.file].release(&stack.range(span, expert));
        }
    }
}

/// A fake-quantized checkpoint with its matrices packed back: see [`Checkpoint::packed`].
#[derive(Debug)]
pub struct Packed<C>(C);

impl<C: Borrow<Checkpoint>> Packed<C> {
    /// The checkpoint itself.
    pub fn checkpoint(&self) -> &Checkpoint {
        self.0.borrow()
    }
}

impl<C: Borrow<Checkpoint> + Send + Sync> Weights for Packed<C> {
    fn config(&self) -> &Config {
        self.checkpoint().config()
    }

    fn format(&self, id: MatrixId) -> Format {
        if self.checkpoint().fake.contains_key(&id) { Format::Nvfp4 } else { self.checkpoint().format(id) }
    }

    fn matrix(&self, id: MatrixId, expert: usize) -> Result<Matrix<'_>, Error> {
        let checkpoint = self.checkpoint();
        let source = checkpoint.matrix(id, expert)?;
        let Some(stack) = checkpoint.fake.get(&id) else { return Ok(source) };
        let Values::Bf16(values) = &source.values else {
            unreachable!("a fake-quantized folder holds BF16 only");
        };
        let span = stack.scales.as_ref().expect("scales are required for a fake-quantized matrix");
        let scales = checkpoint.bytes(span, stack, expert);
        let global_scale = stack.global_scale(expert);
        let mut codes = vec![0; values.len() / 2];
        let recovered = nvfp4::recover_codes(values, &scales, global_scale, &mut codes);
        let packed = Values::Nvfp4 { codes: Cow::Owned(codes), scales, global_scale };
        checkpoint.check(stack, &packed, expert)?;
        recovered.map_err(|at| Error::Format {
            tensor: checkpoint.name_of(id).to_owned(),
            expected: format!(
                "values that its scales in {FAKE_FOLDER}/ make of four bits (if the weights were trained since, \
                 delete that folder)"
            ),
            found: format!("{} at {at} of matrix {expert}", values[at]),
        })?;
        let values = packed;
        Ok(Matrix { rows: source.rows, cols: source.cols, values })
    }

    fn by_inputs(&self, id: MatrixId, expert: usize) -> Result<Option<Values<'_>>, Error> {
        let checkpoint = self.checkpoint();
        if checkpoint.fake.contains_key(&id) { Ok(None) } else { checkpoint.by_inputs(id, expert) }
    }

    fn vector(&self, id: VectorId) -> Result<Vector<'_>, Error> {
        self.checkpoint().vector(id)
    }

    fn input_scale(&self, id: MatrixId) -> Option<f32> {
        let checkpoint = self.checkpoint();
        checkpoint.fake.get(&id).map_or_else(|| checkpoint.input_scale(id), |stack| stack.input_scale)
    }

    fn kv_scales(&self, layer: usize) -> Option<KvScales> {
        self.checkpoint().kv_scales(layer)
    }

    fn identity(&self) -> Option<Identity> {
        self.checkpoint().identity().map(|identity| identity.derived("packed"))
    }

    fn release(&self, id: MatrixId, expert: usize) {
        self.checkpoint().release(id, expert);
    }
}

/// The folder beside fake-quantized weights.
pub(crate) const FAKE_FOLDER: &str = "fake_quant";

/// Its tensor file.
pub(crate) const FAKE_SCALES: &str = "scales.safetensors";

/// The only tensor file of a model in one piece.
pub(crate) const SINGLE: &str = "model.safetensors";

/// The map from tensors to shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Where a logical matrix or stack lies.
#[derive(Debug)]
struct Stack {
    /// The main stored tensor.
    name: String,
    format: Format,
    experts: usize,
    rows: usize,
    cols: usize,
    transposed: bool,
    /// Elements or codes.
    values: Span,
    scales: Option<Span>,
    /// One, or one per expert.
    global_scales: Vec<f32>,
    input_scale: Option<f32>,
    /// Per expert whether its scales have been looked at.
    checked: Box<[AtomicBool]>,
}

impl Stack {
    /// One expert's part of a span.
    fn range(&self, span: &Span, expert: usize) -> Range<usize> {
        assert!(expert < self.experts, "expert {expert} of {}", self.experts);
        let size = span.range.len() / self.experts;
        let start = span.range.start + expert * size;
        start..start + size
    }

    fn global_scale(&self, expert: usize) -> f32 {
        self.global_scales.get(expert).copied().unwrap_or_else(|| self.global_scales[0])
    }
}

/// A range of bytes of a file.
#[derive(Debug, Clone)]
struct Span {
    file: usize,
    dtype: Dtype,
    range: Range<usize>,
}

/// The stored tensors on one side, what the model needs on the other.
struct Ledger<'a> {
    files: &'a [TensorFile],
    /// Index of the first of `files` in the checkpoint.
    first_file: usize,
    tensors: HashMap<&'a str, (usize, &'a StoredTensor)>,
    claimed: BTreeSet<&'a str>,
    mismatch: Mismatch,
}

impl<'a> Ledger<'a> {
    fn new(directory: &Path, files: &'a [TensorFile], first_file: usize) -> Result<Ledger<'a>, Error> {
        let mut tensors = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for tensor in file.tensors() {
                if let Some((earlier, _)) = tensors.insert(tensor.name.as_str(), (index, tensor)) {
                    return Err(Error::file(
                        directory,
                        "every tensor once",
                        format!(
                            "`{}` in both {} and {}",
                            brief(&tensor.name),
                            file_name(files[earlier].path()),
                            file_name(file.path())
                        ),
                    ));
                }
            }
        }
        let (claimed, mismatch) = (BTreeSet::new(), Mismatch::default());
        Ok(Ledger { files, first_file, tensors, claimed, mismatch })
    }

    fn find(&self, slot: &Slot) -> Option<(usize, &'a StoredTensor)> {
        let by_name = |name: &str| self.tensors.get(name).copied();
        by_name(&slot.name).or_else(|| slot.alias.as_deref().and_then(by_name))
    }

    /// Takes the tensor of a slot, with its stored shape; notes what is wrong with it.
    fn claim(&mut self, slot: &Slot) -> Option<(Span, Dtype, &'a [usize])> {
        let Some((file, tensor)) = self.find(slot) else {
            // A fused tensor is asked for three times in a row.
            if slot.required && self.mismatch.missing.last() != Some(&slot.name) {
                self.mismatch.missing.push(slot.name.clone());
            }
            return None;
        };
        let again = !self.claimed.insert(&tensor.name);
        if !slot.dtypes.contains(&tensor.dtype) || !slot.fits(&tensor.shape) {
            if !again {
                let expected: Vec<String> = slot.dtypes.iter().map(ToString::to_string).collect();
                self.mismatch.misshapen.push(format!(
                    "{}: expected {} {:?}, found {} {:?}",
                    brief(&tensor.name),
                    expected.join(" or "),
                    slot.shape,
                    tensor.dtype,
                    tensor.shape
                ));
            }
            return None;
        }
        let span = Span { file: self.first_file + file, dtype: tensor.dtype, range: tensor.range.clone() };
        Some((span, tensor.dtype, &tensor.shape))
    }

    /// Takes the scalar, or one per expert, of a slot.
    fn claim_scales(&mut self, slot: &Slot, invert: bool) -> Result<Option<Vec<f32>>, Error> {
        let Some((span, _, _)) = self.claim(slot) else { return Ok(None) };
        let bytes = self.files[span.file - self.first_file].slice(&span.range);
        let (stored, _) = bytes.as_chunks::<4>();
        let mut values = Vec::with_capacity(stored.len());
        for (at, bytes) in stored.iter().enumerate() {
            let stored = f32::from_le_bytes(*bytes);
            let value = if invert { 1.0 / stored } else { stored };
            if !(stored > 0.0 && stored.is_finite() && value > 0.0 && value.is_finite()) {
                let found = format!("{stored} at {at}");
                return Err(Error::Scale { tensor: slot.name.clone(), found });
            }
            values.push(value);
        }
        Ok(Some(values))
    }

    /// Takes all tensors of a matrix. `None` if something is missing or misshapen, which is noted.
    fn stack(
        &mut self,
        layout: Layout,
        config: &Config,
        id: MatrixId,
        format: Format,
        slots: &[Slot],
    ) -> Result<Option<Stack>, Error> {
        let (experts, rows, cols) = id.kind.shape(config);
        let mut values = None;
        let mut scales = None;
        let (mut global_scales, mut input_scale) = (Vec::new(), None);
        let mut complete = true;
        for slot in slots {
            match slot.role {
                Role::GlobalScale => match self.claim_scales(slot, layout.inverts_scales())? {
                    Some(found) => global_scales = found,
                    None => complete = false,
                },
                Role::InputScale => {
                    let found = self.claim_scales(slot, layout.inverts_scales())?;
                    // Any scale is legal for inputs; the largest covers every expert.
                    input_scale = found.and_then(|found| found.into_iter().reduce(f32::max));
                }
                role => match self.claim(slot) {
                    None => complete = false,
                    Some((mut span, dtype, _)) => {
                        if role == Role::Scales {
                            scales = Some(span);
                        } else {
                            if slot.shape[0] != rows && !id.kind.is_expert() {
                                let row = cols * dtype.bitsize() / 8;
                                span.range.start += slot.first_row * row;
                                span.range.end = span.range.start + rows * row;
                            }
                            values = Some(span);
                        }
                    }
                },
            }
        }
        // Of a fake-quantized matrix only the scales are here.
        let values = values.or_else(|| scales.clone().filter(|_| layout == Layout::FakeBf16));
        Ok(values.filter(|_| complete).map(|values| Stack {
            name: slots[0].name.clone(),
            format,
            experts,
            rows,
            cols,
            transposed: layout.transposes(id.kind),
            values,
            scales,
            global_scales,
            input_scale,
            checked: (0..experts).map(|_| AtomicBool::new(format == Format::Bf16)).collect(),
        }))
    }

    fn kv_scales(
        &mut self,
        layout: Layout,
        config: &Config,
        into: &mut HashMap<usize, KvScales>,
    ) -> Result<(), Error> {
        for layer in 0..config.layer_kinds.len() {
            let slots = layout::kv_scales(layout, layer);
            let mut found = Vec::new();
            for slot in &slots {
                found.extend(
                    self.claim_scales(slot, false)?.and_then(|scales| scales.into_iter().reduce(f32::max)),
                );
            }
            match (slots.as_slice(), found.as_slice()) {
                (_, &[key, value]) => {
                    into.insert(layer, KvScales { key, value });
                }
                ([key, value], [_]) => {
                    let missing = if self.find(key).is_some() { value } else { key };
                    self.mismatch.missing.push(missing.name.clone());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes what Model Optimizer leaves beside weights that are still to be quantized, and counts it.
    fn pass_over_ranges(&mut self) -> usize {
        let is_range =
            |name: &&str| name.ends_with("_quantizer._amax") || name.ends_with("_quantizer._global_amax");
        let before = self.claimed.len();
        self.claimed.extend(self.tensors.keys().copied().filter(is_range));
        self.claimed.len() - before
    }

    fn finish(mut self) -> Mismatch {
        let unclaimed = self.tensors.keys().filter(|name| !self.claimed.contains(*name));
        self.mismatch.unknown = unclaimed.map(|&name| name.to_owned()).collect();
        self.mismatch.unknown.sort_unstable();
        self.mismatch
    }
}

/// The format in which a layout holds a matrix, where it leaves the choice to each: packed codes are U8.
fn stored_format(layout: Layout, config: &Config, id: MatrixId, ledger: &Ledger<'_>) -> Format {
    match layout {
        Layout::Original | Layout::Mxfp4 if id.kind.is_expert() => Format::Mxfp4,
        Layout::ModelOpt | Layout::CompressedTensors if layout.holds(config, id.kind, Format::Nvfp4) => {
            let codes = &layout::matrix(layout, config, id, Format::Nvfp4)[0];
            match ledger.find(codes) {
                Some((_, tensor)) if tensor.dtype == Dtype::U8 => Format::Nvfp4,
                _ => Format::Bf16,
            }
        }
        _ => Format::Bf16,
    }
}

/// Whether a tensor of these files has such a name.
fn any_named(files: &[TensorFile], test: &dyn Fn(&str) -> bool) -> bool {
    files.iter().any(|file| file.tensors().iter().any(|tensor| test(&tensor.name)))
}

/// Whether the experts' matrices have the names of unpacked ones, and none has another.
fn plain_experts(files: &[TensorFile]) -> bool {
    any_named(files, &|name| name.ends_with(".experts.down_proj"))
        && !any_named(files, &|name| name.ends_with("_proj_blocks"))
}

/// The layout of files whose configuration names none.
fn detect(files: &[TensorFile], has_fake: bool) -> Layout {
    let any = |test: &dyn Fn(&str) -> bool| any_named(files, test);
    if any(&|name| name.starts_with("block.") || name == "embedding.weight") {
        Layout::Original
    } else if any(&|name| name.ends_with("_proj_blocks")) {
        Layout::Mxfp4
    } else if any(&|name| name.ends_with(".weight_packed")) {
        Layout::CompressedTensors
    } else if any(&|name| name.ends_with("weight_scale_2")) {
        Layout::ModelOpt
    } else if has_fake {
        Layout::FakeBf16
    } else {
        Layout::Bf16
    }
}

/// The folder's tensor files: those that the index names; without one, or with one of which files are missing,
/// `model.safetensors`, beside which other programs leave tensors that are no part of the model; else all.
fn open_files(directory: &Path) -> Result<Vec<TensorFile>, Error> {
    let index_path = directory.join(INDEX);
    let Some(index) = read_json(&index_path)? else {
        let single = directory.join(SINGLE);
        if single.exists() {
            return Ok(vec![TensorFile::open(&single)?]);
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
            let name = entry.map_err(Error::io(directory))?.file_name();
            if Path::new(&name).extension().is_some_and(|extension| extension == "safetensors") {
                names.push(name);
            }
        }
        if names.is_empty() {
            return Err(Error::file(directory, "a model folder", "no .safetensors file in it"));
        }
        names.sort_unstable();
        return names.iter().map(|name| TensorFile::open(&directory.join(name))).collect();
    };

    let Some(Value::Object(map)) = index.get("weight_map") else {
        return Err(Error::file(&index_path, "an object `weight_map`", "none"));
    };
    let mut by_file: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, file) in map {
        let Some(file) = file.as_str() else {
            return Err(Error::file(
                &index_path,
                format!("a file name for `{}`", brief(tensor)),
                "something else",
            ));
        };
        // A plain name: no separators, no `..`, nothing that leads out of the folder.
        if Path::new(file).file_name() != Some(file.as_ref()) || file.contains(['/', '\\', '\0']) {
            let expected = "names of files in the same folder";
            return Err(Error::file(&index_path, expected, format!("`{}`", brief(file))));
        }
        by_file.entry(file).or_default().insert(tensor);
    }
    // Saving a model in one file over one in shards leaves the index there, at times the shards, too.
    let single = directory.join(SINGLE);
    if single.exists() && !by_file.contains_key(SINGLE) {
        if by_file.keys().any(|name| !directory.join(name).exists()) {
            return Ok(vec![TensorFile::open(&single)?]);
        }
        let expected = format!("either this file or {INDEX} with the files that it names");
        return Err(Error::file(&single, expected, "both"));
    }
    let mut files = Vec::with_capacity(by_file.len());
    for (name, listed) in by_file {
        let file = TensorFile::open(&directory.join(name))?;
        let held: BTreeSet<&str> = file.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
        if let Some(tensor) = listed.difference(&held).next() {
            let expected = format!("tensor `{}` as in {INDEX}", brief(tensor));
            return Err(Error::file(file.path(), expected, "none of that name"));
        }
        if let Some(tensor) = held.difference(&listed).next() {
            let found = format!("`{}`", brief(tensor));
            return Err(Error::file(file.path(), format!("only tensors that {INDEX} puts there"), found));
        }
        files.push(file);
    }
    Ok(files)
}

/// A file of at most `largest` bytes, `None` if there is none.
///
/// # Errors
/// [`Error::File`] if it is larger or no regular file, of which nobody knows whether it ends; [`Error::Io`] if it cannot be read.
pub fn read_file(path: &Path, largest: u64) -> Result<Option<Vec<u8>>, Error> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path)(error)),
    };
    if !metadata.is_file() || metadata.len() > largest {
        let expected = format!("a regular file of at most {largest} bytes");
        return Err(Error::file(path, expected, "something else"));
    }
    fs::read(path).map(Some).map_err(Error::io(path))
}

/// A JSON file, `None` if there is none.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    // The largest real one, an index of thousands of tensors, has some hundred kilobytes.
    let Some(text) = read_file(path, 64 << 20)? else { return Ok(None) };
    // As some editors begin a file.
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&text);
    serde_json::from_slice(text).map(Some).map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// The elements of a matrix that is not packed, as BF16 where they lie or rounded to it.
fn rounded(bytes: &[u8], dtype: Dtype) -> Cow<'_, [bf16]> {
    match dtype {
        Dtype::F32 => elements::<f32>(bytes).iter().map(|&value| bf16::from_f32(value)).collect(),
        Dtype::F16 => elements::<f16>(bytes).iter().map(|value| bf16::from_f32(value.to_f32())).collect(),
        _ => elements(bytes),
    }
}

/// Bytes as elements where they lie, or copied if they are not aligned.
fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

fn file_name(path: &Path) -> Cow<'_, str> {
    path.file_name().map_or_else(|| path.to_string_lossy(), |name| name.to_string_lossy())
}
