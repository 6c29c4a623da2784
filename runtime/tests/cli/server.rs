//! A hub on the loopback: one repository with one file.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    thread,
};

/// Serves `owner/tiny`, which has `tiny.gguf` of the announced `sha256` and length, and sends `content` for it. Returns
/// the URL; it lives as long as the test process.
pub fn hub(content: &'static [u8], sha256: &str, bytes: usize) -> String {
    let listing = format!(
        r#"{{"sha": "c0ffee", "siblings": [{{"rfilename": "tiny.gguf", "size": {bytes}, "lfs": {{"sha256": "{sha256}"}}}}]}}"#
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that has gone is not the server's failure.
            let _ = answer(stream, &listing, content);
        }
    });
    url
}

fn answer(mut stream: TcpStream, listing: &str, content: &[u8]) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    // A client that is not listened to may find its connection reset.
    lines.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
    let body = if request.contains("/api/models/owner/tiny/") { listing.as_bytes() } else { content };
    write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(body)
}
