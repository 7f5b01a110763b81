//! Who calls: from the certificate or from the socket; and which role may make which call.
