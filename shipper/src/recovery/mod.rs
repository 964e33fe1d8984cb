//! Recovery points made into disks again.
