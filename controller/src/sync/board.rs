//! All barriers, topics and parties of one scope: the machine behind the service. Pure.
