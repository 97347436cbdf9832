//! A value with what is made of it once, whoever needs that first.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// A value, and what the engine makes of it, which takes time: clones share both.
pub struct Derived<T, D>(Arc<(T, OnceLock<D>)>);

impl<T, D> Derived<T, D> {
    /// What is made of the value.
    pub(crate) fn get(&self, make: impl FnOnce(&T) -> D) -> &D {
        let (value, derived) = &*self.0;
        derived.get_or_init(|| make(value))
    }
}

impl<T, D> From<T> for Derived<T, D> {
    fn from(value: T) -> Derived<T, D> {
        Derived(Arc::new((value, OnceLock::new())))
    }
}

impl<T, D> Deref for Derived<T, D> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0.0
    }
}

impl<T, D> Clone for Derived<T, D> {
    fn clone(&self) -> Derived<T, D> {
        Derived(Arc::clone(&self.0))
    }
}

impl<T: Default, D> Default for Derived<T, D> {
    fn default() -> Derived<T, D> {
        T::default().into()
    }
}

impl<T: PartialEq, D> PartialEq for Derived<T, D> {
    fn eq(&self, other: &Derived<T, D>) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || **self == **other
    }
}

impl<T: fmt::Debug, D> fmt::Debug for Derived<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::Derived;

    #[test]
    fn clones_share_what_is_made() {
        let words: Derived<Vec<&str>, usize> = vec!["a", "bc"].into();
        let again = words.clone();
        assert_eq!(words.get(|words| words.iter().map(|word| word.len()).sum()), &3);
        assert_eq!(again.get(|_| unreachable!("it was made")), &3);
        assert_eq!((again == words, words == Derived::default()), (true, false));
    }
}
