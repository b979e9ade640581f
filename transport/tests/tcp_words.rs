//! The order of answers on one data stream, and what a reader may conclude from it. Not who reads what. Invariant: an
//! answer's bytes are taken out of memory after those of every earlier answer.

mod raw;

use std::io::{Read as _, Write as _};

use hetmem_transport::{Fabric as _, TcpConfig};

use raw::{Handshake, Node, REGION_LEN, answer, request, say};

/// The owner has both requests; the bytes of the first do not fit into the sockets between. What changes now, while it
/// waits for the reader, is in the second answer.
#[test]
fn a_word_is_loaded_when_its_turn_has_come() {
    let owner = Node::start(TcpConfig { send_buffer_bytes: 64 << 10, ..TcpConfig::default() });
    let (_link, token) = owner.raw_link();
    let mut stream = owner.raw();
    say(&mut stream, &Handshake::Stream { token });
    let (word_at, len) = (REGION_LEN as u64 - 8, REGION_LEN as u64 - 4096);
    owner.memory.write(REGION_LEN - 8, &1_u64.to_le_bytes());
    let both = [request(1, owner.key, 0, len), request(2, owner.key, word_at, 8)].concat();
    stream.write_all(&both).expect("write");
    let mut head = [0; 16];
    stream.read_exact(&mut head).expect("an answer");
    assert_eq!(head[..], answer(1, len)[..]);
    owner.memory.write(REGION_LEN - 8, &2_u64.to_le_bytes());
    let mut bytes = vec![0; usize::try_from(len).expect("small")];
    stream.read_exact(&mut bytes).expect("the bytes");
    let mut second = [0; 24];
    stream.read_exact(&mut second).expect("the second answer");
    assert_eq!(second[..16], answer(2, 8)[..]);
    assert_eq!(second[16..], 2_u64.to_le_bytes());
    owner.fabric.stop();
}
