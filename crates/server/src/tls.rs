//! TLS 1.2 and 1.3: certificates and keys from PEM files, certificates of clients, files that change while the server runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// How often files are looked at.
const REFRESH: Duration = Duration::from_secs(1);

/// How connections are encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// PEM file: the server's certificate, then those that lead to the root.
    pub certificates: PathBuf,
    /// PEM file: the certificate's private key.
    pub key: PathBuf,
    /// PEM file: roots of clients' certificates.
    pub client_roots: Option<PathBuf>,
    /// Whether clients show certificates.
    pub client_certificates: ClientCertificates,
    /// Reads the files again when they change.
    pub refresh: bool,
}

/// Whether clients show certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// They are not asked.
    None,
    /// They may; then it must be a valid one.
    Optional,
    /// They must.
    Required,
}

/// The certificates in use.
#[derive(Debug)]
pub(crate) struct Tls {
    options: TlsOptions,
    config: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub(crate) fn new(options: &TlsOptions) -> Result<Tls, String> {
        let config = RwLock::new(Arc::new(load(options)?));
        Ok(Tls { options: options.clone(), config })
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner)).into()
    }

    /// Follows changes of the files, if that is wanted. Files that cannot be used change nothing.
    pub(crate) async fn refresh(&self) {
        if !self.options.refresh {
            return std::future::pending().await;
        }
        let mut known = self.modified();
        loop {
            tokio::time::sleep(REFRESH).await;
            let found = self.modified();
            if found == known {
                continue;
            }
            match load(&self.options) {
                Ok(config) => {
                    *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                    tracing::info!("the certificates were read again");
                    known = found;
                }
                // The next file may be about to be written: the same is tried again.
                Err(error) => tracing::warn!("the certificates stay as they were: {error}"),
            }
        }
    }

    fn modified(&self) -> Vec<Option<SystemTime>> {
        let TlsOptions { certificates, key, client_roots, .. } = &self.options;
        let files = [Some(certificates), Some(key), client_roots.as_ref()];
        files
            .into_iter()
            .flatten()
            .map(|file| file.metadata().and_then(|data| data.modified()).ok())
            .collect()
    }
}

fn load(options: &TlsOptions) -> Result<ServerConfig, String> {
    let certificates = certificates(&options.certificates)?;
    let key = PrivateKeyDer::from_pem_file(&options.key).map_err(|error| {
        format!("{}: expected a private key as PEM, found: {error}", options.key.display())
    })?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match (&options.client_roots, options.client_certificates) {
        (_, ClientCertificates::None) => builder.with_no_client_auth(),
        (None, _) => return Err("certificates of clients need the roots that they lead to".to_owned()),
        (Some(file), kind) => {
            let mut roots = RootCertStore::empty();
            for certificate in self::certificates(file)? {
                roots.add(certificate).map_err(|error| format!("{}: {error}", file.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = match kind {
                ClientCertificates::Optional => verifier.allow_unauthenticated(),
                _ => verifier,
            };
            builder.with_client_cert_verifier(
                verifier.build().map_err(|error| format!("{}: {error}", file.display()))?,
            )
        }
    };
    let mut config = builder
        .with_single_cert(certificates, key)
        .map_err(|error| format!("{}: {error}", options.certificates.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let fail = |found: String| format!("{}: expected certificates as PEM, found {found}", file.display());
    let found = CertificateDer::pem_file_iter(file).map_err(|error| fail(error.to_string()))?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(|error| fail(error.to_string()))?;
    if found.is_empty() { Err(fail("none".to_owned())) } else { Ok(found) }
}
