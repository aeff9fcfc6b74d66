//! Promises of one file through the public door.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Seek, SeekFrom, Write};

use pinfold::{AllocateMode, Errno, File, IovCursor, OpenOptions, Seek as Find, Volume};

fn volume(memory: u64) -> (tempfile::TempDir, Volume) {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::builder()
        .memory(memory)
        .open_dir(dir.path())
        .unwrap();
    (dir, volume)
}

fn create(volume: &Volume, name: &str) -> File {
    let options = OpenOptions::new().read(true).write(true).create(true);
    volume.open(name, &options).unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u64).wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ seed)
        .collect()
}

#[test]
fn what_was_written_is_read_and_reaches_the_directory() {
    let (dir, volume) = volume(1 << 20);
    let file = create(&volume, "a");
    let data = pattern(100_000, 1);
    assert_eq!(file.write_at(&data, 0).unwrap(), data.len());
    let mut back = vec![0; data.len() + 10];
    assert_eq!(file.read_at(&mut back, 0).unwrap(), data.len());
    assert_eq!(back[..data.len()], data);
    file.sync_all().unwrap();
    assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), data);
    drop(file);
    volume.close().unwrap();
    assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), data);
}

#[test]
fn files_larger_than_the_budget_keep_their_bytes() {
    let (dir, volume) = volume(pinfold::MEMORY_MIN);
    let file = create(&volume, "a");
    let data = pattern(4 << 20, 2);
    for (i, part) in data.chunks(10_000).enumerate() {
        assert_eq!(file.write_at(part, i as u64 * 10_000).unwrap(), part.len());
    }
    let mut back = vec![0; data.len()];
    for (i, part) in back.chunks_mut(7_777).enumerate() {
        let want = part.len();
        assert_eq!(file.read_at(part, i as u64 * 7_777).unwrap(), want);
    }
    assert!(back == data);
    drop(file);
    drop(volume);
    assert!(std::fs::read(dir.path().join("a")).unwrap() == data);
}

#[test]
fn a_file_that_was_there_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let data = pattern(123_457, 3);
    std::fs::write(dir.path().join("old"), &data).unwrap();
    let volume = Volume::builder()
        .memory(1 << 20)
        .open_dir(dir.path())
        .unwrap();
    let file = volume.open("old", &OpenOptions::new().read(true)).unwrap();
    let mut back = Vec::new();
    (&file).read_to_end(&mut back).unwrap();
    assert!(back == data);
    assert_eq!(file.write_at(b"x", 0).unwrap_err().errno(), Errno::EBADF);
}

#[test]
fn direct_and_buffered_agree() {
    let (_dir, volume) = volume(1 << 20);
    let file = create(&volume, "a");
    let direct = volume
        .open("a", &OpenOptions::new().read(true).write(true).direct(true))
        .unwrap();
    file.write_at(&[b'q'; 16384], 0).unwrap();
    let mut buf = pinfold::AlignedBuf::zeroed(8192);
    assert_eq!(direct.read_at(buf.as_mut_slice(), 4096).unwrap(), 8192);
    assert!(buf.as_mut_slice().iter().all(|&b| b == b'q'));
    buf.as_mut_slice().fill(b'2');
    assert_eq!(direct.write_at(buf.as_mut_slice(), 4096).unwrap(), 8192);
    let mut back = vec![0; 16384];
    assert_eq!(file.read_at(&mut back, 0).unwrap(), 16384);
    assert!(back[..4096].iter().all(|&b| b == b'q'));
    assert!(back[4096..12288].iter().all(|&b| b == b'2'));
    assert!(back[12288..].iter().all(|&b| b == b'q'));
    assert_eq!(
        direct
            .write_at(buf.as_mut_slice(), 100)
            .unwrap_err()
            .errno(),
        Errno::EINVAL
    );
    // Extending, and reading at the end.
    assert_eq!(direct.write_at(buf.as_mut_slice(), 16384).unwrap(), 8192);
    assert_eq!(file.len(), 24576);
    assert_eq!(direct.read_at(buf.as_mut_slice(), 24576).unwrap(), 0);
}

#[test]
fn truncation_and_holes_read_as_zeros() {
    let (_dir, volume) = volume(1 << 20);
    let file = create(&volume, "a");
    file.write_at(&[7; 20_000], 0).unwrap();
    file.set_len(5000).unwrap();
    file.set_len(9000).unwrap();
    let mut back = vec![1; 20_000];
    assert_eq!(file.read_at(&mut back, 0).unwrap(), 9000);
    assert!(back[..5000].iter().all(|&b| b == 7) && back[5000..9000].iter().all(|&b| b == 0));
    file.write_at(b"end", 100_000).unwrap();
    assert_eq!(file.read_at(&mut back, 9000).unwrap(), 20_000);
    assert!(back.iter().all(|&b| b == 0));
    file.punch(100..4200).unwrap();
    file.read_at(&mut back[..5000], 0).unwrap();
    assert!(back[..100].iter().all(|&b| b == 7));
    assert!(back[100..4200].iter().all(|&b| b == 0));
    assert!(back[4200..5000].iter().all(|&b| b == 7));
    file.allocate(AllocateMode::Extend, 0..200_000).unwrap();
    assert_eq!(file.len(), 200_000);
    // Where the hole before it ends is the store's to say; the data itself must be found.
    let found = file.seek_to(Find::Data, 60_000).unwrap().unwrap();
    assert!((60_000..=100_000).contains(&found), "{found}");
    assert_eq!(file.seek_to(Find::Data, 100_001).unwrap(), Some(100_001));
}

#[test]
fn the_file_position_moves_with_reads_and_writes() {
    let (_dir, volume) = volume(1 << 20);
    let file = create(&volume, "a");
    (&file).write_all(b"hello world").unwrap();
    (&file).seek(SeekFrom::Start(6)).unwrap();
    let mut word = String::new();
    (&file).read_to_string(&mut word).unwrap();
    assert_eq!(word, "world");
    assert_eq!(file.append(b"!").unwrap(), (11, 1));
}

#[test]
fn a_second_engine_on_the_directory_is_refused() {
    let (dir, _volume) = volume(1 << 20);
    let error = Volume::builder().open_dir(dir.path()).unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY);
    assert!(error.to_string().contains("another Pinfold"), "{error}");
}

#[test]
fn the_ordinary_case_never_brings_memory_in() {
    let (_dir, volume) = volume(1 << 20);
    let file = create(&volume, "a");
    let before = volume.statistics().fault_in_calls;
    let mut buf = vec![1; 4096];
    for i in 0..1000 {
        file.write_at(&buf, i % 50 * 4096).unwrap();
        file.read_at(&mut buf, i % 50 * 4096).unwrap();
    }
    assert_eq!(volume.statistics().fault_in_calls, before);
}

/// Lists extents as (start, end, waits to be stored).
fn extents(file: &File, range: std::ops::Range<u64>, room: usize) -> (Vec<(u64, u64, bool)>, bool) {
    let mut records = vec![0; room * pinfold::EXTENT_RECORD];
    let mut into = IovCursor::from_mut_slice(&mut records);
    let found = file.extents(range, &mut into).unwrap();
    let word =
        |record: &[u8], at: usize| u64::from_ne_bytes(record[at..at + 8].try_into().unwrap());
    let listed = records.chunks(pinfold::EXTENT_RECORD).take(found.records);
    let listed = listed.map(|record| {
        let (start, len, flags) = (word(record, 0), word(record, 16), word(record, 40));
        (start, start + len, flags & 4 != 0)
    });
    (listed.collect(), found.more)
}

#[test]
fn extents_tell_data_holes_and_what_waits_to_be_stored() {
    let (_dir, volume) = volume(1 << 20);
    let file = create(&volume, "a");
    assert_eq!(extents(&file, 0..u64::MAX, 4), (vec![], false));
    let block = 64 << 10;
    file.write_at(&pattern(block, 1), 0).unwrap();
    file.write_at(&pattern(block, 2), 3 * block as u64).unwrap();
    file.sync_all().unwrap();
    let block = block as u64;
    let stored = vec![(0, block, false), (3 * block, 4 * block, false)];
    assert_eq!(extents(&file, 0..u64::MAX, 4), (stored.clone(), false));
    assert_eq!(extents(&file, 0..u64::MAX, 1), (stored[..1].to_vec(), true));
    assert_eq!(extents(&file, block..2 * block, 4), (vec![], false));
    assert_eq!(extents(&file, 100..101, 4).0, [(100, block, false)]);
    // In the hole, over what is stored, and longer than the store's file.
    file.write_at(b"x", 2 * block).unwrap();
    file.write_at(b"x", 3 * block + 5000).unwrap();
    file.write_at(b"x", 5 * block + 99).unwrap();
    let expected = vec![
        (0, block, false),
        (2 * block, 2 * block + 4096, true),
        (3 * block, 3 * block + 4096, false),
        (3 * block + 4096, 3 * block + 8192, true),
        (3 * block + 8192, 4 * block, false),
        (5 * block, 5 * block + 100, true),
    ];
    assert_eq!(extents(&file, 0..u64::MAX, 9), (expected, false));
}
