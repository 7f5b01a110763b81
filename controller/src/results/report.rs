//! test.json, stream.json, result.json and the sentence a failed test ends with.
