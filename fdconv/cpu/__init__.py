"""The operator on CPUs: chunk by chunk, in memory that is used again, in steps of torch or of compiled C++."""
