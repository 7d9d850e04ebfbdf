//! A small HTTP/1.1 client over a socket, so that tests see every byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

/// An answer with its body put together.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("bodies are UTF-8")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// The chunks of an event stream, checked to end with `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"), "{}", self.text());
        let mut lines: Vec<&str> = self.text().split_terminator("\n\n").filter(|line| !line.starts_with(':')).collect();
        assert_eq!(lines.pop(), Some("data: [DONE]"));
        let parse = |line: &str| {
            let data = line.strip_prefix("data: ").expect("every line is data");
            serde_json::from_str(data).expect("every chunk is JSON")
        };
        lines.into_iter().map(parse).collect()
    }
}

/// A connection that can carry several requests.
pub(crate) struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> Self {
        Self { reader: BufReader::new(TcpStream::connect(address).expect("the server listens")) }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).expect("the server reads");
    }

    /// Sends what it can; the server may close early.
    pub(crate) fn send_some(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).ok();
    }

    /// Reads one answer.
    pub(crate) fn receive(&mut self) -> Reply {
        let (status, headers) = self.receive_head();
        let mut reply = Reply { status, headers, body: Vec::new() };
        if reply.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.receive_chunk() {
                reply.body.extend(chunk);
            }
        } else {
            let len = reply.header("content-length").map_or(0, |len| len.parse().expect("a length"));
            reply.body = vec![0; len];
            self.reader.read_exact(&mut reply.body).expect("a whole body");
        }
        reply
    }

    /// Reads the status line and the headers.
    pub(crate) fn receive_head(&mut self) -> (u16, Vec<(String, String)>) {
        let status = self.line();
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { return (status, headers) };
            headers.push((name.to_owned(), value.to_owned()));
        }
    }

    /// Reads one piece of a chunked body; `None` at its end.
    pub(crate) fn receive_chunk(&mut self) -> Option<Vec<u8>> {
        let len = usize::from_str_radix(&self.line(), 16).expect("a chunk size");
        let mut chunk = vec![0; len + 2];
        self.reader.read_exact(&mut chunk).expect("a whole chunk");
        chunk.truncate(len);
        (len > 0).then_some(chunk)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    /// Whether the server has closed its side.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.reader.fill_buf(), Ok([]) | Err(_))
    }
}

/// The bytes of a request with a JSON body.
pub(crate) fn post(path: &str, body: &[u8], headers: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// The bytes of a request without a body.
pub(crate) fn get(path: &str, headers: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").into_bytes()
}
