//! Requests, the scheduler, KV blocks, sampling and the offline API.
