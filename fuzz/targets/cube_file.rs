//! A cube's file: its header as it comes, and what it says about the cube behind a header that is whole.

#![no_main]

mod panics;

use libfuzzer_sys::fuzz_target;
use mneme::memory::Incoming;
use mneme::paging::Archive;

fuzz_target!(init: panics::let_the_code_catch(), |bytes: &[u8]| {
    if let Ok(incoming) = Incoming::open(bytes) {
        assert!(incoming.token_ids().is_none_or(|token_ids| token_ids.len() <= bytes.len()));
    }
    let Ok(note) = std::str::from_utf8(bytes) else { return };
    let mut file = Vec::new();
    Archive { note: note.to_owned(), blocks: None }.write_header(&mut file).expect("a header of this length");
    if let Ok(incoming) = Incoming::open(&file[..]) {
        incoming.into_plaintext().expect("a file without blocks has a text");
    }
});
