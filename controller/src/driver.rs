//! The one loop of the controller: select, feed the machines, perform their actions.
