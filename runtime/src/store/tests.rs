//! The store against a server on the loopback.

use std::{
    env,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use sha2::Digest as _;
use tempfile::TempDir;

use super::{
    test_server::{Reply, Server},
    *,
};

pub(super) const FILE: &str = "tiny.gguf";
pub(super) const MEMBER: &str = "package/tiny.gguf";

/// 300 kB without a period that a shift could hide in.
pub(super) fn content() -> Vec<u8> {
    (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A known model with the digest of `bytes`, on the hub and in a wheel.
pub(super) fn model(bytes: &[u8]) -> &'static KnownModel {
    let digest = Digest { sha256: sha256(bytes).leak(), bytes: bytes.len() as u64 };
    Box::leak(Box::new(KnownModel {
        id: "tiny",
        aliases: &[],
        parameters: 1,
        licence: "MIT",
        sources: vec![
            Source::Hub { repo: "owner/tiny", revision: "v1", file: FILE, digest: Some(digest) },
            Source::Pip { package: "tiny", version: "1.0", member: MEMBER, digest },
        ]
        .leak(),
    }))
}

/// A store in a folder of its own, on `url` and without pip.
pub(super) fn store(url: &str) -> (Store, TempDir) {
    store_with_token(url, None)
}

fn store_with_token(url: &str, token: Option<&str>) -> (Store, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::new(url, token.map(str::to_owned)).with_pause(Duration::from_millis(1));
    (Store::at(folder.path().join("store")).with_hub(hub).with_pip(Pip::new([])), folder)
}

pub(super) fn quiet(_: Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Names of the files in the folder of the model.
pub(super) fn files(store: &Store, model: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(store.models().join(model)) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What the only source that counts said.
fn hub_error(error: StoreError) -> StoreError {
    match error {
        StoreError::AllSources { mut failed, .. } => failed.remove(0).1,
        error => error,
    }
}

/// A server of `content` at any path.
fn file_server() -> Server {
    let content = content();
    Server::start(move |request| Reply::file(request, &content))
}

#[test]
fn a_file_arrives_whole_with_its_record() {
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let mut last = (0, None);
    let path = store
        .pull_known(model(&content()), &mut |event| {
            if let Progress::Arrived { done_bytes, total_bytes, .. } = event {
                assert!(done_bytes >= last.0);
                last = (done_bytes, total_bytes);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(last, (300_000, Some(300_000)));
    assert_eq!(fs::read(&path).unwrap(), content());
    assert_eq!(files(&store, "tiny"), ["thinkey.json", FILE]);
    assert_eq!(server.requests()[0].path, "/owner/tiny/resolve/v1/tiny.gguf");

    let [installed] = &store.list().unwrap()[..] else { panic!("one model") };
    assert_eq!(installed.path, path);
    assert_eq!(installed.record.source, "hub owner/tiny@v1:tiny.gguf");
    assert_eq!(installed.record.files[0].sha256, sha256(&content()));
    assert_eq!(installed.record.bytes(), 300_000);

    store.pull_known(model(&content()), &mut quiet).unwrap();
    assert_eq!(server.requests().len(), 1, "what is there is not asked for again");
}

#[test]
fn a_cut_connection_is_taken_up_where_it_broke() {
    let content = content();
    let first = AtomicUsize::new(0);
    let server = Server::start({
        let content = content.clone();
        move |request| match first.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::file(request, &content).cut(100_000),
            1 => Reply::new(503),
            _ => Reply::file(request, &content),
        }
    });
    let (store, _folder) = store(&server.url);
    let path = store.pull_known(model(&content), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(server.ranges(), [None, Some(100_000), Some(100_000)]);
}

#[test]
fn the_next_pull_goes_on_where_a_cancelled_one_stopped() {
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let mut stop = |event: Progress<'_>| match event {
        Progress::Arrived { done_bytes: 100_000.., .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    assert!(matches!(store.pull_known(model(&content()), &mut stop), Err(StoreError::Cancelled)));
    assert_eq!(files(&store, "tiny"), ["tiny.gguf.part"]);
    let path = store.pull_known(model(&content()), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    assert!(server.ranges()[1].is_some_and(|from| from >= 100_000));
}

#[test]
fn a_server_that_ignores_ranges_does_not_corrupt() {
    let content = content();
    let first = AtomicUsize::new(0);
    let server = Server::start({
        let content = content.clone();
        move |_| match first.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::whole(&content).cut(100_000),
            _ => Reply::whole(&content),
        }
    });
    let (store, _folder) = store(&server.url);
    let path = store.pull_known(model(&content), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(server.ranges(), [None, Some(100_000)]);
}

#[test]
fn a_range_that_was_not_asked_for_does_not_corrupt() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request| match request.from() {
            Some(_) => Reply::partial(&content, 7),
            None => Reply::whole(&content),
        }
    });
    let (store, _folder) = store(&server.url);
    let folder = store.models().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf.part"), &content[..1000]).unwrap();
    let path = store.pull_known(model(&content), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(server.ranges(), [Some(1000), None]);
}

#[test]
fn remains_of_another_file_are_replaced() {
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let folder = store.models().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf.part"), [7; 1000]).unwrap();
    let path = store.pull_known(model(&content()), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    assert_eq!(server.ranges(), [Some(1000), None]);
}

#[test]
fn a_complete_part_needs_no_request() {
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let folder = store.models().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf.part"), content()).unwrap();
    store.pull_known(model(&content()), &mut quiet).unwrap();
    assert!(server.requests().is_empty());
}

#[test]
fn wrong_content_names_both_digests_and_leaves_nothing() {
    let mut wrong = content();
    wrong[299_999] ^= 1;
    let found = sha256(&wrong);
    let server = Server::start(move |request| Reply::file(request, &wrong));
    let (store, _folder) = store(&server.url);
    let error = hub_error(store.pull_known(model(&content()), &mut quiet).unwrap_err());
    assert!(error.to_string().contains(&found) && error.to_string().contains(&sha256(&content())), "{error}");
    assert_eq!(server.requests().len(), 1);
    assert!(files(&store, "tiny").is_empty());
}

#[test]
fn lying_lengths_are_caught() {
    let content = content();
    // More and less than the model has; and the right length for a body that is cut every time.
    for (length, sent) in [(400_000, 300_000), (200_000, 200_000), (300_000, 1000)] {
        let server = Server::start({
            let content = content.clone();
            move |_| Reply::whole(&content).with(format!("Content-Length: {length}")).cut(sent)
        });
        let (store, _folder) = store(&server.url);
        let error = hub_error(store.pull_known(model(&content), &mut quiet).unwrap_err());
        match error {
            StoreError::Length { expected: 300_000, found, .. } => assert_eq!(found, length),
            StoreError::Transfer { .. } => assert_eq!((length, server.requests().len()), (300_000, 3)),
            error => panic!("{error}"),
        }
        assert!(!store.models().join("tiny").join(FILE).exists());
    }
}

#[test]
fn a_body_without_end_is_cut_off() {
    let mut long = content();
    long.extend([0; 100_000]);
    let body = [format!("{:x}\r\n", long.len()).as_bytes(), &long, b"\r\n0\r\n\r\n"].concat();
    let server = Server::start(move |_| Reply::whole(&body).with("Transfer-Encoding: chunked"));
    let (store, _folder) = store(&server.url);
    let error = hub_error(store.pull_known(model(&content()), &mut quiet).unwrap_err());
    assert!(matches!(error, StoreError::Length { expected: 300_000, .. }), "{error}");
    assert!(files(&store, "tiny").is_empty());
}

#[test]
fn statuses_say_what_to_do() {
    let cases = [
        (401, None, "set HF_TOKEN", 1),
        (401, Some("secret"), "not accepted", 1),
        (403, Some("secret"), "accept the model's licence", 1),
        (404, None, "no such repository, revision or file", 1),
        (500, None, "try again later", 3),
    ];
    for (status, token, words, requests) in cases {
        let server = Server::start(move |_| Reply::new(status));
        let (store, _folder) = store_with_token(&server.url, token);
        let error = store.pull("owner/tiny:tiny.gguf", &mut quiet).unwrap_err().to_string();
        assert!(error.contains(&format!("status {status}")) && error.contains(words), "{error}");
        assert!(!error.contains("secret"));
        assert_eq!(server.requests()[0].header("authorization"), token.map(|_| "Bearer secret"));
        let (store, _folder) = store_with_token(&server.url, token);
        store.pull_known(model(&content()), &mut quiet).unwrap_err();
        assert_eq!(server.requests().len() - 1, requests, "status {status}");
    }
}

#[test]
fn a_refused_range_starts_over() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request| if request.from().is_some() { Reply::new(416) } else { Reply::whole(&content) }
    });
    let (store, _folder) = store(&server.url);
    let folder = store.models().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf.part"), &content[..1000]).unwrap();
    let path = store.pull_known(model(&content), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
}

#[test]
fn a_redirect_keeps_the_range_and_hides_the_token() {
    let content_server = Arc::new(file_server());
    let target = format!("{}/blob?signature=x", content_server.url.replace("127.0.0.1", "localhost"));
    let server = Server::start(move |_| Reply::new(302).with(format!("Location: {target}")));
    let (store, _folder) = store_with_token(&server.url, Some("secret"));
    let folder = store.models().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf.part"), &content()[..1000]).unwrap();
    let path = store.pull_known(model(&content()), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    assert_eq!(server.requests()[0].header("authorization"), Some("Bearer secret"));
    let [request] = &content_server.requests()[..] else { panic!("one request") };
    assert_eq!((request.from(), request.header("authorization")), (Some(1000), None));
}

#[test]
fn a_redirect_within_the_hub_keeps_the_token() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request| match request.path.as_str() {
            "/cache/tiny" => Reply::file(request, &content),
            _ => Reply::new(307).with("Location: /cache/tiny"),
        }
    });
    let (store, _folder) = store_with_token(&server.url, Some("secret"));
    store.pull_known(model(&content), &mut quiet).unwrap();
    assert!(server.requests().iter().all(|request| request.header("authorization") == Some("Bearer secret")));
    assert_eq!(server.requests().len(), 2);
}

/// A hub with one repository at commit `c0ffee`, whose branch is `main`.
fn repository(files: Vec<(&'static str, Vec<u8>, Option<String>)>) -> Server {
    Server::start(move |request| {
        if request.path == "/api/models/owner/tiny/revision/main?blobs=true" {
            let siblings: Vec<_> = files
                .iter()
                .map(|(name, body, lfs)| {
                    let lfs = lfs.as_ref().map(|sha256| serde_json::json!({ "sha256": sha256 }));
                    serde_json::json!({ "rfilename": name, "size": body.len(), "lfs": lfs })
                })
                .collect();
            let listing = serde_json::json!({ "sha": "c0ffee", "siblings": siblings });
            return Reply::whole(listing.to_string().as_bytes());
        }
        let file = files.iter().find(|(name, ..)| request.path == format!("/owner/tiny/resolve/c0ffee/{name}"));
        file.map_or(Reply::new(404), |(_, body, _)| Reply::file(request, body))
    })
}

#[test]
fn a_folder_model_comes_at_one_commit() {
    let (weights, config) = (content(), b"{}".to_vec());
    let server = repository(vec![
        ("README.md", b"no".to_vec(), None),
        ("config.json", config.clone(), None),
        ("model.safetensors", weights.clone(), Some(sha256(&weights))),
    ]);
    let (store, _folder) = store(&server.url);
    assert!(matches!(store.resolve("owner/tiny"), Err(StoreError::NotPulled { .. })));
    let path = store.pull("owner/tiny", &mut quiet).unwrap();
    assert_eq!(fs::read(path.join("config.json")).unwrap(), config);
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights);
    assert_eq!(store.resolve("owner/tiny").unwrap(), path);
    let record = store.verify("owner/tiny", &mut quiet).unwrap();
    assert_eq!((record.revision.as_str(), record.files.len(), record.entry), ("c0ffee", 2, None));
}

#[test]
fn what_the_hub_announces_is_checked() {
    let server = repository(vec![("q4/tiny.gguf", content(), Some("0".repeat(64)))]);
    let (store, _folder) = store(&server.url);
    let error = store.pull("owner/tiny:q4/tiny.gguf", &mut quiet).unwrap_err();
    assert!(matches!(&error, StoreError::Checksum { found, .. } if *found == sha256(&content())), "{error}");
    assert!(store.find("owner/tiny:q4/tiny.gguf").unwrap().is_none());
}

#[test]
fn a_login_page_is_not_a_listing() {
    let server = Server::start(|_| Reply::whole(b"<html>log in</html>"));
    let (store, _folder) = store(&server.url);
    let error = store.pull("owner/tiny", &mut quiet).unwrap_err();
    assert!(error.to_string().contains("not the hub's answer"), "{error}");
}

#[test]
fn verify_finds_a_changed_file() {
    let server = repository(vec![("tiny.gguf", content(), Some(sha256(&content())))]);
    let (store, _folder) = store(&server.url);
    let path = store.pull("owner/tiny", &mut quiet).unwrap();
    assert_eq!(path.file_name().unwrap(), FILE);
    store.verify("owner/tiny", &mut quiet).unwrap();
    let mut changed = content();
    changed[5] ^= 1;
    fs::write(&path, &changed).unwrap();
    assert!(matches!(store.verify("owner/tiny", &mut quiet), Err(StoreError::Checksum { .. })));
    // A shorter one is as good as none, and the next pull replaces it.
    fs::write(&path, &changed[..5]).unwrap();
    assert!(store.find("owner/tiny").unwrap().is_none());
    store.pull("owner/tiny", &mut quiet).unwrap();
    store.verify("owner/tiny", &mut quiet).unwrap();
    assert!(store.remove("owner/tiny", &mut quiet).unwrap());
    assert!(!store.remove("owner/tiny", &mut quiet).unwrap());
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_path_is_used_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    fs::write(&path, "x").unwrap();
    let (store, _folder) = store("http://127.0.0.1:1");
    assert_eq!(store.pull(path.to_str().unwrap(), &mut quiet).unwrap(), path);
    assert_eq!(store.resolve(path.to_str().unwrap()).unwrap(), path);
    assert!(!store.remove(path.to_str().unwrap(), &mut quiet).unwrap());
    assert!(path.exists() && !store.root().exists());
}

#[test]
fn a_store_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("file");
    fs::write(&root, "not a folder").unwrap();
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let store = Store { root, ..store };
    let error = store.pull_known(model(&content()), &mut quiet).unwrap_err();
    assert!(matches!(error, StoreError::Write { .. }), "{error}");
    assert!(error.to_string().contains("set THINKEY_HOME"), "{error}");
    assert!(server.requests().is_empty(), "no other source would help");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_pull() {
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let folder = store.models().join("tiny");
    fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink("/dev/full", folder.join("tiny.gguf.part")).unwrap();
    let error = store.pull_known(model(&content()), &mut quiet).unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { needed: 300_000, .. }), "{error}");
}

#[test]
fn two_pulls_at_once_download_once() {
    let server = file_server();
    let (store, _folder) = store(&server.url);
    let model = model(&content());
    let paths = thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| store.pull_known(model, &mut quiet).unwrap())).collect();
        pulls.into_iter().map(|pull| pull.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(paths.iter().all(|path| fs::read(path).unwrap() == content()));
    assert_eq!(server.requests().len(), 1);
}

const CHILD: &str = "THINKEY_TEST_PULL";

/// Not a test of its own: the process that [`a_killed_pull_leaves_only_a_part`] kills.
#[test]
fn child_that_pulls() {
    let Some(arguments) = env::var_os(CHILD) else { return };
    let arguments = arguments.into_string().unwrap();
    let (url, root) = arguments.split_once(' ').unwrap();
    let _ = Store::at(root).with_hub(Hub::new(url, None)).pull_known(model(&content()), &mut quiet);
}

#[test]
fn a_killed_pull_leaves_only_a_part() {
    let content = content();
    let first = AtomicUsize::new(0);
    let server = Server::start({
        let content = content.clone();
        move |request| match first.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::file(request, &content).hold(200_000),
            _ => Reply::file(request, &content),
        }
    });
    let (store, _folder) = store(&server.url);
    let module = module_path!().split_once("::").unwrap().1;
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::child_that_pulls")])
        .env(CHILD, format!("{} {}", server.url, store.root().display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let part = store.models().join("tiny").join("tiny.gguf.part");
    let start = Instant::now();
    while fs::metadata(&part).map_or(0, |found| found.len()) < 200_000 {
        assert!(start.elapsed() < Duration::from_secs(30), "the child does not pull");
        thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(files(&store, "tiny"), ["tiny.gguf.part"]);
    assert!(store.list().unwrap().is_empty());

    let path = store.pull_known(model(&content), &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(server.ranges(), [None, Some(200_000)]);
}
