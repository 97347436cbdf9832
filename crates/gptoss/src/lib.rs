//! The gpt-oss model: the Backend trait and the readable f32 reference.
