//! Copying a closed epoch into segments.
