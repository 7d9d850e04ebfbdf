//! Tokenizers: bytes, decoding, hostile vocabularies.
