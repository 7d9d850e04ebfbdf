//! Files for tests: those of this module, of models and of adapters.

/// Writes GGUF files field by field, as the specification lists them.
pub(crate) struct Writer {
    num_tensors: u64,
    num_entries: u64,
    metadata: Vec<u8>,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { num_tensors: 0, num_entries: 0, metadata: vec![], infos: vec![], data: vec![] }
    }

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    pub(crate) fn entry(mut self, key: &str, code: u32, payload: &[u8]) -> Self {
        self.num_entries += 1;
        Self::text(&mut self.metadata, key);
        self.metadata.extend(code.to_le_bytes());
        self.metadata.extend(payload);
        self
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        let mut payload = vec![];
        Self::text(&mut payload, value);
        self.entry(key, 8, &payload)
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut payload = 8u32.to_le_bytes().to_vec();
        payload.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| Self::text(&mut payload, value));
        self.entry(key, 9, &payload)
    }

    pub(crate) fn floats(self, key: &str, values: &[f32]) -> Self {
        let mut payload = 6u32.to_le_bytes().to_vec();
        payload.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| payload.extend(value.to_le_bytes()));
        self.entry(key, 9, &payload)
    }

    pub(crate) fn info(mut self, name: &str, dims: &[u64], code: u32, offset: u64) -> Self {
        self.num_tensors += 1;
        Self::text(&mut self.infos, name);
        self.infos.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| self.infos.extend(dim.to_le_bytes()));
        self.infos.extend(code.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], code: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.info(name, dims, code, offset)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.num_tensors.to_le_bytes());
        out.extend(self.num_entries.to_le_bytes());
        out.extend(self.metadata);
        out.extend(self.infos);
        if self.num_tensors > 0 {
            out.resize(out.len().next_multiple_of(32), 0);
        }
        out.extend(self.data);
        out
    }
}
