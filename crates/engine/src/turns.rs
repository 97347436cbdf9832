//! Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng 1996), a request being the unit of service.

use std::collections::HashMap;

/// Clients that are remembered before those that have nothing waiting are forgotten.
const REMEMBERED: usize = 1024;

/// Numbers of turns by client. Requests of lower turns are served first, so a client with many of them waits behind its own. A turn
/// that nobody took is the next request's of the same client.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Of the latest request that began.
    now: u64,
    clients: HashMap<Option<[u8; 32]>, Client>,
}

#[derive(Debug, Default)]
struct Client {
    /// The turn after its latest request that began.
    next: u64,
    /// Requests that did not begin.
    waiting: u64,
}

impl Turns {
    /// The turn of a client's next request, which waits from now on.
    pub(crate) fn next(&mut self, client: Option<[u8; 32]>) -> u64 {
        if self.clients.len() >= REMEMBERED {
            let now = self.now;
            self.clients.retain(|_, client| client.waiting > 0 || client.next > now);
        }
        let client = self.clients.entry(client).or_default();
        let turn = self.now.max(client.next) + client.waiting;
        client.waiting += 1;
        turn
    }

    /// A waiting request of this turn begins.
    pub(crate) fn begin(&mut self, client: Option<[u8; 32]>, turn: u64) {
        self.now = self.now.max(turn);
        if let Some(client) = self.clients.get_mut(&client) {
            client.next = client.next.max(turn + 1);
            client.waiting = client.waiting.saturating_sub(1);
        }
    }

    /// A waiting request will not begin.
    pub(crate) fn leave(&mut self, client: Option<[u8; 32]>) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.waiting = client.waiting.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Option<[u8; 32]> = Some([1; 32]);
    const OTHER: Option<[u8; 32]> = Some([2; 32]);

    #[test]
    fn a_client_with_much_to_do_does_not_keep_another_waiting() {
        let mut turns = Turns::default();
        let many: Vec<u64> = (0..100).map(|_| turns.next(ONE)).collect();
        assert!(many.is_sorted_by(|a, b| a < b));
        many[..8].iter().for_each(|&turn| turns.begin(ONE, turn));
        let few = [turns.next(OTHER), turns.next(OTHER)];
        // Its first before all that wait, its second after the other's next one only.
        assert!(few[0] < many[8] && few[0] >= many[7], "{few:?}");
        assert_eq!(few[1], many[8]);
    }

    #[test]
    fn who_was_away_has_saved_nothing_up() {
        let mut turns = Turns::default();
        let turn = turns.next(OTHER);
        turns.begin(OTHER, turn);
        (0..50).for_each(|_| {
            let turn = turns.next(ONE);
            turns.begin(ONE, turn);
        });
        assert_eq!(turns.next(OTHER), turns.now);
        assert_eq!(turns.next(OTHER), turns.now + 1);
    }

    #[test]
    fn who_hangs_up_gives_the_turn_back() {
        let mut turns = Turns::default();
        let others: Vec<u64> = (0..6).map(|_| turns.next(OTHER)).collect();
        (0..300).for_each(|_| {
            turns.next(ONE);
        });
        (0..300).for_each(|_| turns.leave(ONE));
        assert!(turns.next(ONE) <= others[0]);
        // What begins keeps its turn.
        turns.begin(ONE, others[0]);
        assert_eq!(turns.next(ONE), others[1]);
    }

    #[test]
    fn memory_is_bounded_and_who_waits_is_not_forgotten() {
        let mut turns = Turns::default();
        let last = (0..20_000).map(|_| turns.next(ONE)).last();
        for i in 0..10_000u32 {
            let mut client = [0; 32];
            client[..4].copy_from_slice(&i.to_le_bytes());
            let turn = turns.next(Some(client));
            // A client a turn.
            turns.begin(Some(client), turn + 1);
            assert!(turns.clients.len() <= REMEMBERED + 1);
        }
        assert!(Some(turns.next(ONE)) > last);
    }
}
