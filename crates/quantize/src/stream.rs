//! Activations of all calibration tokens in a file of the scratch folder, so that memory holds a few windows of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use checkpoint::Error;

/// Rows of f32, one per token.
pub(crate) struct Stream {
    file: File,
    path: PathBuf,
    width: usize,
}

impl Stream {
    /// An empty stream of rows of `width` values.
    pub(crate) fn create(path: &Path, width: usize) -> Result<Stream, Error> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        Stream::over(file, path, width)
    }

    /// A stream that an earlier run wrote.
    pub(crate) fn open(path: &Path, width: usize) -> Result<Stream, Error> {
        Stream::over(File::options().read(true).write(true).open(path), path, width)
    }

    fn over(file: std::io::Result<File>, path: &Path, width: usize) -> Result<Stream, Error> {
        let file = file.map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok(Stream { file, path: path.to_owned(), width })
    }

    /// Rows `first ..  first + count`.
    pub(crate) fn read(&self, first: usize, count: usize) -> Result<Vec<f32>, Error> {
        let mut rows = vec![0.0f32; count * self.width];
        let at = (first * self.width * 4) as u64;
        self.check(self.file.read_exact_at(bytemuck::cast_slice_mut(&mut rows), at))?;
        Ok(rows)
    }

    /// The rows of these tokens.
    pub(crate) fn gather(&self, tokens: &[usize]) -> Result<Vec<f32>, Error> {
        let mut rows = vec![0.0f32; tokens.len() * self.width];
        for (row, &token) in rows.chunks_exact_mut(self.width).zip(tokens) {
            let at = (token * self.width * 4) as u64;
            self.check(self.file.read_exact_at(bytemuck::cast_slice_mut(row), at))?;
        }
        Ok(rows)
    }

    /// Writes rows from `first` on.
    pub(crate) fn write(&self, first: usize, rows: &[f32]) -> Result<(), Error> {
        self.check(self.file.write_all_at(bytemuck::cast_slice(rows), (first * self.width * 4) as u64))
    }

    /// Adds a row to that of each of these tokens.
    pub(crate) fn add(&self, tokens: &[usize], rows: &[f32]) -> Result<(), Error> {
        let mut sums = self.gather(tokens)?;
        sums.iter_mut().zip(rows).for_each(|(sum, row)| *sum += row);
        for (row, &token) in sums.chunks_exact(self.width).zip(tokens) {
            self.write(token, row)?;
        }
        Ok(())
    }

    /// Makes what was written last.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.check(self.file.sync_all())
    }

    fn check(&self, result: std::io::Result<()>) -> Result<(), Error> {
        result.map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}
