//! What is shipped, as it arrives on hosts.

use std::fs;

use millstream_common::{limits, spec::BlobDigest};

use super::*;

#[tokio::test]
async fn a_payload_is_sent_once_to_each_host_however_many_tasks_need_it() {
    let lab = lab();
    let directory = tempfile::tempdir().unwrap();
    let payload = directory.path().join("payload");
    fs::create_dir_all(payload.join("deep/er")).unwrap();
    // Too large to travel inside a specification.
    let size = limits::INLINE_FILE_BYTES_MAX + 1;
    fs::write(payload.join("one"), vec![1; size]).unwrap();
    fs::write(payload.join("deep/er/two"), vec![2; size]).unwrap();
    fs::write(payload.join("deep/the-same"), vec![1; size]).unwrap();
    for _ in 0..10 {
        for stream in ["a", "b"] {
            lab.streams.get(stream).unwrap().run_bg(word("true").dir(&payload));
        }
    }
    assert_eq!(lab.streams.wait().await.unwrap().outcomes.len(), 20);
    let mut uploaded = lab.fake.lock().uploaded.clone();
    uploaded.sort();
    let mut contents = [1_u8, 2].map(|byte| BlobDigest::of(&vec![byte; size]).to_string());
    contents.sort();
    assert_eq!(uploaded, contents);
}
