//! Sends the requests at their times and gathers what became of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::arrivals::{Arrivals, RequestRate};
use super::client::Client;
use super::request::RequestShape;
use crate::cli::bench::timing::Timing;

/// Which requests, and when.
pub(super) struct Load {
    pub(super) shape: Arc<RequestShape>,
    pub(super) num_requests: usize,
    pub(super) rate: RequestRate,
    pub(super) max_concurrency: usize,
    pub(super) seed: u64,
}

/// What became of them.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) timings: Vec<Timing>,
    pub(super) num_failed: usize,
    pub(super) first_error: Option<String>,
    pub(super) duration: Duration,
}

impl Load {
    /// Runs all requests to their ends. A request whose time has come waits until fewer than `max_concurrency` run.
    pub(super) async fn run(self, client: &Arc<Client>) -> Outcome {
        let permits = Arc::new(Semaphore::new(self.max_concurrency));
        let (mut tasks, mut outcome) = (JoinSet::new(), Outcome::default());
        let started_at = Instant::now();
        for (index, arrival) in Arrivals::new(self.rate, self.seed).take(self.num_requests).enumerate() {
            tokio::time::sleep_until((started_at + arrival).into()).await;
            let permit = Arc::clone(&permits).acquire_owned().await.expect("the semaphore is never closed");
            let (shape, client) = (Arc::clone(&self.shape), Arc::clone(client));
            tasks.spawn(async move {
                let result = shape.run(&client, index).await;
                drop(permit);
                result
            });
            while let Some(done) = tasks.try_join_next() {
                outcome.add(done.unwrap_or_else(|error| Err(error.into())));
            }
        }
        while let Some(done) = tasks.join_next().await {
            outcome.add(done.unwrap_or_else(|error| Err(error.into())));
        }
        outcome.duration = started_at.elapsed();
        outcome
    }
}

impl Outcome {
    fn add(&mut self, result: anyhow::Result<Timing>) {
        match result {
            Ok(timing) => self.timings.push(timing),
            Err(error) => {
                self.num_failed += 1;
                self.first_error.get_or_insert_with(|| format!("{error:#}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::cli::bench::prompts::PromptShape;
    use crate::cli::bench::serve::Endpoint;

    const ANSWER: &str = concat!(
        "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n",
        "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"length\"}],",
        "\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n"
    );

    /// Answers the first request with an error and all further ones with [`ANSWER`], on one kept connection each.
    fn serve(listener: &TcpListener, num_requests: usize) {
        let mut num_answered = 0;
        while num_answered < num_requests {
            let (mut stream, _) = listener.accept().unwrap();
            while read_request(&mut stream) {
                let (status, body) =
                    if num_answered == 0 { ("503 Busy", "come back later") } else { ("200 OK", ANSWER) };
                let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all((head + body).as_bytes()).unwrap();
                num_answered += 1;
                if num_answered == num_requests {
                    return;
                }
            }
        }
    }

    fn read_request(stream: &mut impl Read) -> bool {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let text = String::from_utf8_lossy(&bytes);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head
                    .lines()
                    .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
                if body.len() >= length.unwrap_or(0) {
                    return true;
                }
            }
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return false,
                Ok(num_read) => bytes.extend_from_slice(&buffer[..num_read]),
            }
        }
    }

    #[test]
    fn failures_are_counted_and_the_first_is_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || serve(&listener, 4));
        let load = Load {
            shape: Arc::new(RequestShape {
                endpoint: Endpoint::Completions,
                model: "m".into(),
                prompts: PromptShape { prefix_len: 0, input_len: 3, seed: 0 },
                token_ids: vec![1, 2],
                output_len: 2,
                temperature: 0.0,
                ignore_eos: false,
            }),
            num_requests: 4,
            rate: "inf".parse().unwrap(),
            max_concurrency: 1,
            seed: 0,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = Arc::new(Client::new(&url, None, Duration::from_secs(60)).unwrap());
        let outcome = runtime.block_on(load.run(&client));
        drop((client, runtime));
        server.join().unwrap();
        assert_eq!((outcome.timings.len(), outcome.num_failed), (3, 1), "{:?}", outcome.first_error);
        assert!(outcome.first_error.unwrap().contains("503"));
        assert!(outcome.timings.iter().all(|timing| (timing.num_input_tokens, timing.num_output_tokens) == (3, 2)));
    }
}
