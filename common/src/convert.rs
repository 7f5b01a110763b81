//! The one place where wire meets domain.
