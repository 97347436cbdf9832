//! Scale search, algorithms and recipes: weights in, weights out.
