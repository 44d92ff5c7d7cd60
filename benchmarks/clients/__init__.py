"""What each client library is asked to do, in its own words; `benchmarks.client_libraries` runs these files."""
