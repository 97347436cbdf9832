//! Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng 1996), a request being the unit of service.

use std::collections::HashMap;

/// Clients that are remembered before those that have nothing waiting are forgotten.
const REMEMBERED: usize = 1024;

/// Numbers of turns by client. Requests of lower turns are served first, so a client with many of them waits behind its own.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Of the latest request that began.
    now: u64,
    /// Of the last request of each client.
    last: HashMap<Option<[u8; 32]>, u64>,
}

impl Turns {
    /// The turn of a client's next request.
    pub(crate) fn next(&mut self, client: Option<[u8; 32]>) -> u64 {
        if self.last.len() >= REMEMBERED {
            let now = self.now;
            self.last.retain(|_, last| *last >= now);
        }
        let turn = self.last.get(&client).map_or(self.now, |last| self.now.max(last + 1));
        self.last.insert(client, turn);
        turn
    }

    /// A request of this turn begins.
    pub(crate) fn begin(&mut self, turn: u64) {
        self.now = self.now.max(turn);
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
        many[..8].iter().for_each(|&turn| turns.begin(turn));
        let few = [turns.next(OTHER), turns.next(OTHER)];
        // Its first before all that wait, its second after the other's next one only.
        assert!(few[0] < many[8] && few[0] >= many[7], "{few:?}");
        assert_eq!(few[1], many[8]);
    }

    #[test]
    fn who_was_away_has_saved_nothing_up() {
        let mut turns = Turns::default();
        turns.next(OTHER);
        (0..50).for_each(|_| {
            let turn = turns.next(ONE);
            turns.begin(turn);
        });
        assert_eq!(turns.next(OTHER), turns.now);
        assert_eq!(turns.next(OTHER), turns.now + 1);
    }

    #[test]
    fn memory_is_bounded_and_who_waits_is_not_forgotten() {
        let mut turns = Turns::default();
        turns.begin(5);
        let waiting: Vec<u64> = (0..20_000).map(|_| turns.next(ONE)).collect();
        for i in 0..10_000u32 {
            let mut client = [0; 32];
            client[..4].copy_from_slice(&i.to_le_bytes());
            let turn = turns.next(Some(client));
            // A client a turn.
            turns.begin(turn + 1);
            assert!(turns.last.len() <= REMEMBERED + 1);
        }
        assert_eq!(Some(&turns.next(ONE)), waiting.last().map(|turn| turn + 1).as_ref());
    }
}
