//! A small HTTP/1.1 server on the loopback for the tests of the store: every connection carries one request.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// What a client asked.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Path with query.
    pub path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// Value of the header `name`, given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// First byte asked for.
    pub fn from(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What the server answers.
#[derive(Clone, Debug, Default)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<String>,
    body: Vec<u8>,
    sent: Option<usize>,
    hold: bool,
}

impl Reply {
    /// An answer whose headers do not depend on its body.
    pub fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// All of `body`, whatever range was asked for.
    pub fn whole(body: &[u8]) -> Self {
        Self { body: body.to_vec(), ..Self::new(200) }
    }

    /// `body` from the first byte that was asked for.
    pub fn file(request: &Request, body: &[u8]) -> Self {
        match request.from() {
            None => Self::whole(body),
            Some(from) if from >= body.len() => Self::new(416),
            Some(from) => Self::partial(body, from),
        }
    }

    /// `body` from byte `from`.
    pub fn partial(body: &[u8], from: usize) -> Self {
        let range = format!("Content-Range: bytes {from}-{}/{}", body.len() - 1, body.len());
        Self { body: body[from..].to_vec(), ..Self::new(206) }.with(range)
    }

    /// With another header line.
    pub fn with(mut self, header: impl Into<String>) -> Self {
        self.headers.push(header.into());
        self
    }

    /// Closes the connection after `bytes` of the body.
    pub fn cut(self, bytes: usize) -> Self {
        Self { sent: Some(bytes), ..self }
    }

    /// Leaves the connection open, and silent, after `bytes` of the body.
    pub fn hold(self, bytes: usize) -> Self {
        Self { sent: Some(bytes), hold: true, ..self }
    }

    fn send(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", self.status);
        for header in &self.headers {
            head += &format!("{header}\r\n");
        }
        if !self.headers.iter().any(|header| header.starts_with("Content-Length") || header.starts_with("Transfer")) {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        stream.write_all(&self.body[..self.sent.unwrap_or(self.body.len()).min(self.body.len())])?;
        if self.hold {
            let _ = stream.read(&mut [0]);
        }
        stream.shutdown(Shutdown::Both)
    }
}

/// The server; it lives as long as the test process.
pub(super) struct Server {
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers every request with what `answer` says.
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (answer, seen) = (Arc::new(answer), Arc::clone(&requests));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                thread::spawn(move || {
                    let Some(request) = read_request(&stream) else { return };
                    seen.lock().unwrap().push(request.clone());
                    // A client that has gone is the subject of some tests.
                    let _ = answer(&request).send(stream);
                });
            }
        });
        Self { url, requests }
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// First bytes asked for, request by request.
    pub fn ranges(&self) -> Vec<Option<usize>> {
        self.requests().iter().map(Request::from).collect()
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(':').map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_owned())))
        .collect();
    Some(Request { path, headers })
}
