//! How a model is named: a [known model](super::KnownModel), a hub repository or a path.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

use super::{
    error::StoreError,
    known::{KNOWN, KnownModel},
};

/// What a name means.
#[derive(Clone, Debug)]
pub(super) enum ModelName {
    /// A model of [`KNOWN`].
    Known(&'static KnownModel),
    /// A repository on the hub, or one file of it.
    Hub(HubName),
    /// A file or folder that exists.
    Path(PathBuf),
}

/// `OWNER/NAME[@revision][:file]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubName {
    pub repo: String,
    pub revision: Option<String>,
    pub file: Option<String>,
}

impl ModelName {
    /// Known names win over everything (a folder that happens to be called `smollm2` is `./smollm2`), then comes what
    /// exists as a path, then the hub.
    pub fn parse(name: &str) -> Result<Self, StoreError> {
        if let Some(known) = KnownModel::find(name) {
            return Ok(Self::Known(known));
        }
        let path = Path::new(name);
        if path.exists() {
            return Ok(Self::Path(path.to_path_buf()));
        }
        let path_like = path.is_absolute()
            || name.starts_with(['.', '~'])
            || name.contains('\\')
            || (name.ends_with(".gguf") && !name.contains(':'));
        if path_like {
            return Err(StoreError::NoSuchPath { path: path.to_path_buf() });
        }
        if !name.contains('/') {
            let known = KNOWN.iter().map(|model| model.id).collect::<Vec<_>>().join(", ");
            return Err(StoreError::UnknownModel { name: name.to_owned(), known });
        }
        HubName::parse(name).map(Self::Hub)
    }

    /// Name of the model's folder in the store: one path component on every platform.
    pub fn folder(&self) -> Option<String> {
        match self {
            Self::Known(model) => Some(model.id.replace(':', "-")),
            Self::Hub(hub) => Some(hub.to_string().replace('/', "--").replace(':', "+")),
            Self::Path(_) => None,
        }
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(model) => f.write_str(model.id),
            Self::Hub(hub) => hub.fmt(f),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

impl HubName {
    fn parse(name: &str) -> Result<Self, StoreError> {
        let bad = |reason| StoreError::BadName { name: name.to_owned(), reason };
        // Everything here ends up in a URL and in a path: only what is itself in both.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');

        let (head, file) = match name.split_once(':') {
            Some((head, file)) => (head, Some(file)),
            None => (name, None),
        };
        let (repo, revision) = match head.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (head, None),
        };
        let parts: Vec<&str> = repo.split('/').collect();
        let [owner, model] = parts[..] else { return Err(bad("a repository is OWNER/NAME")) };
        for part in [owner, model] {
            if part.is_empty() || part.starts_with('.') || !part.chars().all(plain) {
                return Err(bad("OWNER and NAME consist of letters, digits, `.`, `_` and `-`"));
            }
        }
        let inside = |text: &str| {
            !text.is_empty()
                && text.chars().all(|c| plain(c) || c == '/')
                && Path::new(text).components().all(|part| matches!(part, Component::Normal(_)))
        };
        if revision.is_some_and(|revision| !inside(revision)) {
            return Err(bad("a revision is a branch, a tag or a commit"));
        }
        if file.is_some_and(|file| !inside(file) || file.ends_with('/')) {
            return Err(bad("a file is a path inside the repository"));
        }
        Ok(Self { repo: repo.to_owned(), revision: revision.map(str::to_owned), file: file.map(str::to_owned) })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(file) = &self.file {
            write!(f, ":{file}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(name: &str) -> HubName {
        match ModelName::parse(name).unwrap() {
            ModelName::Hub(hub) => hub,
            other => panic!("{name} parsed as {other:?}"),
        }
    }

    #[test]
    fn hub_names_round_trip() {
        for name in ["Qwen/Qwen3-0.6B", "a/b@main", "a/b:c.gguf", "a/b@refs/pr/1:q4/c.gguf"] {
            assert_eq!(hub(name).to_string(), name);
        }
        assert_eq!(
            hub("a/b@refs/pr/1:q4/c.gguf"),
            HubName { repo: "a/b".into(), revision: Some("refs/pr/1".into()), file: Some("q4/c.gguf".into()) }
        );
    }

    #[test]
    fn names_that_would_leave_the_store_or_the_url_are_refused() {
        for name in [
            "a/b:../c.gguf",
            "a/b:/etc/passwd",
            "a/b:",
            "a/b@",
            "a/b@../..",
            "a/..",
            "a/b/c",
            "a/b?x",
            "a/b:c d.gguf",
            "a/b:c#d",
            "https://huggingface.co/a/b",
        ] {
            assert!(matches!(ModelName::parse(name), Err(StoreError::BadName { .. })), "{name}");
        }
    }

    #[test]
    fn folders_are_one_component() {
        for name in ["smollm2", "a/b@refs/pr/1:q4/c.gguf"] {
            let folder = ModelName::parse(name).unwrap().folder().unwrap();
            assert_eq!(Path::new(&folder).components().count(), 1, "{folder}");
            assert!(!folder.contains(':'), "{folder}");
        }
    }

    #[test]
    fn a_path_that_does_not_exist_is_not_looked_for_on_the_hub() {
        for name in ["./model", "/no/such/model", "models/x.gguf", "~/x", r"C:\x"] {
            assert!(matches!(ModelName::parse(name), Err(StoreError::NoSuchPath { .. })), "{name}");
        }
        assert!(matches!(ModelName::parse("gpt2"), Err(StoreError::UnknownModel { .. })));
    }
}
