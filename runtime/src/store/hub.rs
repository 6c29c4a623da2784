//! Downloads from the Hugging Face hub or a mirror of it.
//!
//! The `hf-hub` crate is not used: in 0.4 and 0.5 a resumed download appends whatever the server answers, also the whole
//! file from a server that ignores `Range`, checks neither length nor digest, has no time-outs and does not read
//! `HF_TOKEN`; 1.0 needs an async runtime. What remains of it is two URL patterns. So this module speaks to `ureq`
//! itself, with rustls on the certificates of the operating system: a company's own authority and proxy work.

use std::{
    env, fmt, fs,
    io::Read,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use etcetera::BaseStrategy;
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{Response, StatusCode, header},
    tls::{RootCerts, TlsConfig},
};

use super::{
    Fetched, OnProgress, Progress,
    error::StoreError,
    known::Digest,
    listing::Listing,
    part::{CHUNK, Expected, Part, report},
    record::FileRecord,
};

/// Time for the look-up of a name and, again, for a connection with its TLS handshake. Short: in a closed network this
/// is what a user waits before the next source is tried.
const CONNECT: Duration = Duration::from_secs(5);
/// Time without a single byte after which a transfer counts as broken.
const STALL: Duration = Duration::from_secs(30);
/// Attempts in a row that may fail without bringing a byte.
const ATTEMPTS: u32 = 3;

/// The hub to download from.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    offline: bool,
    pause: Duration,
    agent: Agent,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token stays out of every log.
        f.debug_struct("Hub").field("endpoint", &self.endpoint).field("token", &self.token.is_some()).finish()
    }
}

/// What is asked of the hub.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub repo: &'a str,
    pub revision: &'a str,
    /// One file, or what [`Listing::choose`] takes for the model.
    pub file: Option<&'a str>,
    /// What the file must be; without it, what the hub announces.
    pub digest: Option<Digest>,
}

impl Hub {
    /// The hub at `endpoint` (scheme and host, `https://huggingface.co`), with an access token if there is one.
    #[must_use]
    pub fn new(endpoint: &str, token: Option<String>) -> Self {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let config = Agent::config_builder()
            .user_agent(concat!("thinkey/", env!("CARGO_PKG_VERSION")))
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .http_status_as_error(false)
            // The hub sends large files from other hosts, which get no token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(STALL))
            .timeout_per_read(Some(STALL));
        // No proxy can reach a server on this machine for us.
        let host = endpoint.split_once("://").map_or("", |(_, host)| host);
        let config = if ["localhost", "127.", "[::1]"].iter().any(|local| host.starts_with(local)) {
            config.proxy(None)
        } else {
            config
        };
        Self { endpoint, token, offline: false, pause: Duration::from_secs(1), agent: config.build().into() }
    }

    /// The hub as the environment sets it up, in the words of the hub's own tools: `HF_ENDPOINT`, `HF_HUB_OFFLINE`, and
    /// the token in `HF_TOKEN`, else in the file `HF_TOKEN_PATH`, `$HF_HOME/token` or `~/.cache/huggingface/token`.
    #[must_use]
    pub fn from_env() -> Self {
        let set = |name| env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let token_file = || {
            let home = || match set("HF_HOME") {
                Some(home) => Some(PathBuf::from(home)),
                None => Some(etcetera::choose_base_strategy().ok()?.cache_dir().join("huggingface")),
            };
            let path = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home()?.join("token")))?;
            Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let offline = set("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()));
        Self { offline, ..Self::new(&endpoint, set("HF_TOKEN").or_else(token_file)) }
    }

    /// Sets how long to wait before a broken transfer is taken up again; doubled for each failure in a row.
    #[cfg(test)]
    pub(super) fn with_pause(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    /// Downloads what is asked for into `folder`.
    pub(super) fn fetch(
        &self,
        request: &Request<'_>,
        folder: &Path,
        progress: &mut OnProgress<'_>,
    ) -> Result<Fetched, StoreError> {
        if self.offline {
            return Err(StoreError::Offline);
        }
        let Request { repo, revision, file, digest } = *request;
        // With a digest in hand there is nothing to ask the hub for but the file.
        if let (Some(file), Some(Digest { sha256, bytes })) = (file, digest) {
            let (what, sha256) = (self.resolve_url(repo, revision, file), Some(sha256.to_owned()));
            let record =
                self.download(&Expected { what, bytes: Some(bytes), sha256 }, &target(folder, file), progress)?;
            return Ok(Fetched {
                revision: revision.to_owned(),
                entry: Some(record.name.clone()),
                files: vec![record],
            });
        }
        let listing = self.list(repo, revision)?;
        let chosen = listing.choose(&format!("{repo}@{revision}"), file)?;
        let files = chosen
            .iter()
            .map(|file| {
                // By commit: a branch that moves meanwhile would mix two versions.
                let what = self.resolve_url(repo, &listing.sha, &file.path);
                let expected = Expected { what, bytes: file.size, sha256: file.sha256() };
                self.download(&expected, &target(folder, &file.path), progress)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let entry = match &files[..] {
            [file] => Some(file.name.clone()),
            _ => None,
        };
        Ok(Fetched { revision: listing.sha, entry, files })
    }

    fn resolve_url(&self, repo: &str, revision: &str, file: &str) -> String {
        format!("{}/{repo}/resolve/{}/{file}", self.endpoint, revision.replace('/', "%2F"))
    }

    /// Asks what the repository holds at `revision`.
    fn list(&self, repo: &str, revision: &str) -> Result<Listing, StoreError> {
        let url = format!("{}/api/models/{repo}/revision/{}?blobs=true", self.endpoint, revision.replace('/', "%2F"));
        let response = self.get(&url, 0)?;
        if response.status() != StatusCode::OK {
            return Err(self.status_error(&url, response.status()));
        }
        let broken = |reason: String| StoreError::Transfer { url: url.clone(), reason };
        let text = response.into_body().read_to_vec().map_err(|error| broken(error.to_string()))?;
        let listing: Listing =
            serde_json::from_slice(&text).map_err(|error| broken(format!("not the hub's answer: {error}")))?;
        if listing.sha.is_empty() || !listing.sha.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(broken(format!("`{}` is not a commit", listing.sha)));
        }
        Ok(listing)
    }

    /// Downloads the URL `expected.what` to `target`, going on where an earlier attempt, or a broken connection, stopped.
    fn download(
        &self,
        expected: &Expected,
        target: &Path,
        progress: &mut OnProgress<'_>,
    ) -> Result<FileRecord, StoreError> {
        let mut part = Part::open(target, expected, progress)?;
        let mut old = part.len() > 0;
        let mut failures = 0;
        loop {
            let before = part.len();
            let error = match self.stream(&expected.what, &mut part, expected, progress) {
                Ok(()) => match part.finish() {
                    // Perhaps the remains of another file: once from the start.
                    Err(StoreError::Checksum { .. }) if old => {
                        old = false;
                        part = Part::open(target, expected, progress)?;
                        continue;
                    }
                    done => return done,
                },
                Err(error @ StoreError::Length { .. }) => {
                    part.discard();
                    return Err(error);
                }
                Err(error) => error,
            };
            let arrived = part.len() > before;
            failures = if arrived { 1 } else { failures + 1 };
            let again = error.is_transient() || (matches!(error, StoreError::Unreachable { .. }) && part.len() > 0);
            if !again || failures >= ATTEMPTS {
                if part.len() == 0 {
                    part.discard();
                }
                return Err(error);
            }
            tracing::debug!("{error}; trying again");
            self.wait(failures, &part, expected, progress)?;
        }
    }

    /// One request for what is missing of `part`, and its body.
    fn stream(
        &self,
        url: &str,
        part: &mut Part<'_>,
        expected: &Expected,
        progress: &mut OnProgress<'_>,
    ) -> Result<(), StoreError> {
        if part.is_complete() {
            return Ok(());
        }
        let broken = |reason: String| StoreError::Transfer { url: url.to_owned(), reason };
        let response = self.get(url, part.len())?;
        let total = match response.status() {
            StatusCode::OK => {
                if part.len() > 0 {
                    part.restart()?;
                }
                response.body().content_length()
            }
            StatusCode::PARTIAL_CONTENT => {
                let text = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let Some((start, total)) = text.and_then(content_range) else {
                    return Err(broken("a part of the file, but which is not said".to_owned()));
                };
                if start != part.len() {
                    let asked = part.len();
                    part.restart()?;
                    return Err(broken(format!("asked for the bytes from {asked}, got those from {start}")));
                }
                total
            }
            status => {
                if status == StatusCode::RANGE_NOT_SATISFIABLE {
                    part.restart()?;
                }
                return Err(self.status_error(url, status));
            }
        };
        if let (Some(found), Some(expected)) = (total, expected.bytes)
            && found != expected
        {
            return Err(StoreError::Length { what: url.to_owned(), expected, found });
        }
        let total = expected.bytes.or(total);
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        loop {
            report(progress, Progress::Arrived { what: url, done_bytes: part.len(), total_bytes: total })?;
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => part.write(&buffer[..n])?,
                Err(error) => return Err(broken(format!("broke off after {} bytes: {error}", part.len()))),
            }
        }
        match total {
            Some(total) if part.len() < total => {
                Err(broken(format!("broke off after {} of {total} bytes", part.len())))
            }
            _ => Ok(()),
        }
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, StoreError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|error| self.call_error(url, &error))
    }

    fn call_error(&self, url: &str, error: &ureq::Error) -> StoreError {
        use ureq::{Error, Timeout};

        let reason = match error {
            Error::HostNotFound => "the name does not resolve".to_owned(),
            Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                format!("no connection within {} seconds", CONNECT.as_secs())
            }
            Error::Io(error) => error.to_string(),
            Error::ConnectionFailed | Error::ConnectProxyFailed(_) | Error::Tls(_) | Error::Rustls(_) => {
                error.to_string()
            }
            _ => return StoreError::Transfer { url: url.to_owned(), reason: error.to_string() },
        };
        StoreError::Unreachable { endpoint: self.endpoint.clone(), reason }
    }

    fn status_error(&self, url: &str, status: StatusCode) -> StoreError {
        StoreError::Status { url: url.to_owned(), status: status.as_u16(), authorised: self.token.is_some() }
    }

    fn wait(
        &self,
        failures: u32,
        part: &Part<'_>,
        expected: &Expected,
        progress: &mut OnProgress<'_>,
    ) -> Result<(), StoreError> {
        let end = Instant::now() + self.pause * 2u32.pow(failures - 1);
        while Instant::now() < end {
            let event = Progress::Arrived { what: &expected.what, done_bytes: part.len(), total_bytes: expected.bytes };
            report(progress, event)?;
            thread::sleep(Duration::from_millis(50).min(self.pause));
        }
        Ok(())
    }
}

/// Where a file of a repository goes: models are flat folders.
fn target(folder: &Path, file: &str) -> PathBuf {
    folder.join(file.rsplit('/').next().unwrap_or(file))
}

/// First byte and total length in `bytes 5-9/10` or `bytes 5-9/*`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        for text in ["", "bytes */10", "items 5-9/10", "bytes 5/10", "bytes -5-9/10"] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    #[test]
    fn a_revision_is_one_segment_of_the_url() {
        let hub = Hub::new("http://127.0.0.1:1/", None);
        assert_eq!(
            hub.resolve_url("a/b", "refs/pr/1", "q4/c.gguf"),
            "http://127.0.0.1:1/a/b/resolve/refs%2Fpr%2F1/q4/c.gguf"
        );
    }

    #[test]
    fn the_token_is_not_printed() {
        assert!(!format!("{:?}", Hub::new("http://127.0.0.1:1", Some("secret".into()))).contains("secret"));
    }
}
