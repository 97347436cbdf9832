//! The o200k byte-pair encoding and incremental detokenization.
