//! The guards of the format that the last chats had: clients come again with the same functions.

use std::sync::Arc;

use harmony::{Guard, Harmony};

/// Guards that are kept, of some megabytes each where there are many functions.
const MOST: usize = 16;

/// The last guards; the latest is the last.
#[derive(Default)]
pub(crate) struct Guards(Vec<Known>);

/// The guard of a turn in which these functions may be called.
struct Known {
    tools: Arc<[String]>,
    guard: Option<Arc<Guard>>,
}

impl Guards {
    /// The guard for some functions, as [`Harmony::guard`] makes it.
    pub(crate) fn get(&mut self, harmony: &Harmony, tools: &Arc<[String]>) -> Option<Arc<Guard>> {
        let known = self.0.iter().position(|known| known.tools == *tools);
        if known.is_none() && self.0.len() == MOST {
            self.0.remove(0);
        }
        let latest = match known {
            Some(at) => self.0.remove(at),
            None => Known { tools: Arc::clone(tools), guard: harmony.guard(tools).map(Arc::new) },
        };
        let guard = latest.guard.clone();
        self.0.push(latest);
        guard
    }
}

#[cfg(test)]
mod tests {
    use tokenizer::Tokenizer;

    use super::*;

    #[test]
    fn the_last_are_kept() {
        let harmony = Harmony::new(Tokenizer::o200k_harmony()).unwrap();
        let tools = |i: usize| -> Arc<[String]> { [format!("f{i}")].into() };
        let mut guards = Guards::default();
        let first = guards.get(&harmony, &tools(0)).unwrap();
        for i in 1..MOST {
            guards.get(&harmony, &tools(i)).unwrap();
            assert!(Arc::ptr_eq(&guards.get(&harmony, &tools(0)).unwrap(), &first), "{i}");
        }
        for i in MOST..2 * MOST {
            guards.get(&harmony, &tools(i)).unwrap();
            assert!(guards.0.len() <= MOST);
        }
        assert!(!Arc::ptr_eq(&guards.get(&harmony, &tools(0)).unwrap(), &first));
    }
}
