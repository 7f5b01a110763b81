#!/bin/sh
# Installs, updates or removes the agent on a host without dpkg, from the directory that this script lies in (an unpacked
# millstream-agent-VERSION-MACHINE.tar.gz). Running it again is harmless; tasks go on while the agent is replaced.
#
#   ./install.sh               installs, or updates what is installed
#   ./install.sh --uninstall   ends the agent and all blocks and removes the program; /etc/millstream and /var/log/millstream stay
#
# PREFIX says where the program goes (/usr/local), DESTDIR for which root directory it is installed (none: this host).
set -eu

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
here=$(cd "$(dirname "$0")" && pwd)
program=$DESTDIR$PREFIX/bin/millstream-agent
units=$DESTDIR/etc/systemd/system
temporary=$DESTDIR/etc/tmpfiles.d/millstream.conf
configuration=$DESTDIR/etc/millstream/agent.yaml
services="millstream-agent millstream-blocks millstream-pki@"

complain() { echo "install.sh: $*" >&2; exit 1; }

# systemd is told only about the host that it runs on.
has_systemd() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

# Puts a file in place in one step: whoever runs or reads the old one keeps it.
put() { # MODE FROM TO
  mkdir -p "$(dirname "$3")"
  cp "$2" "$3.new"
  chmod "$1" "$3.new"
  mv "$3.new" "$3"
}

# Whom the units name: the group whose members may look at the agent, and who the authority runs as.
make_users() {
  groupadd --force --system millstream || complain "the group millstream cannot be made: make it, and run this again"
  id -u millstream-pki >/dev/null 2>&1 ||
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin millstream-pki ||
    complain "the user millstream-pki cannot be made: make it with a group of its own, and run this again"
}

uninstall() {
  if has_systemd; then
    systemctl disable --quiet --now millstream-agent.service millstream-pki@.service 2>/dev/null || true
    systemctl stop 'millstream-pki@*.service' millstream-blocks.service 2>/dev/null || true
  elif [ -z "$DESTDIR" ] && [ -x "$program" ] && "$program" status >/dev/null 2>&1; then
    complain "the agent runs: let its blocks end (millstream-agent drain --wait), have this host end it, and run this again"
  fi
  rm -f "$program" "$temporary"
  for service in $services; do rm -f "$units/$service.service"; done
  rm -f "$DESTDIR$PREFIX"/share/man/man1/millstream-agent*.1 \
    "$DESTDIR$PREFIX/share/bash-completion/completions/millstream-agent" \
    "$DESTDIR$PREFIX/share/zsh/site-functions/_millstream-agent" \
    "$DESTDIR$PREFIX/share/fish/vendor_completions.d/millstream-agent.fish"
  rm -rf "$DESTDIR/var/lib/millstream" "$DESTDIR/run/millstream"
  if has_systemd; then systemctl daemon-reload; fi
  echo "removed $program; $DESTDIR/etc/millstream stays: remove it when its certificates are not needed any more"
}

install() {
  for file in millstream-agent agent.yaml systemd/millstream.tmpfiles; do
    [ -f "$here/$file" ] || complain "no \`$file\` in $here: run this script where the whole archive is unpacked"
  done
  version=$("$here/millstream-agent" --version) ||
    complain "\`$here/millstream-agent\` does not run here: it was built for $(od -An -tx1 -j18 -N2 "$here/millstream-agent" | tr -d ' '), this host is $(uname -m)"
  if has_systemd; then make_users; fi
  put 755 "$here/millstream-agent" "$program"
  mkdir -p "$units"
  for service in $services; do
    sed "s,^ExecStart=/usr/bin/,ExecStart=$PREFIX/bin/," "$here/systemd/$service.service" >"$units/$service.service.new"
    chmod 644 "$units/$service.service.new"
    mv "$units/$service.service.new" "$units/$service.service"
  done
  put 644 "$here/systemd/millstream.tmpfiles" "$temporary"
  for page in "$here"/man/*.1; do put 644 "$page" "$DESTDIR$PREFIX/share/man/man1/${page##*/}"; done
  put 644 "$here/completions/millstream-agent" "$DESTDIR$PREFIX/share/bash-completion/completions/millstream-agent"
  put 644 "$here/completions/_millstream-agent" "$DESTDIR$PREFIX/share/zsh/site-functions/_millstream-agent"
  put 644 "$here/completions/millstream-agent.fish" "$DESTDIR$PREFIX/share/fish/vendor_completions.d/millstream-agent.fish"
  if [ -e "$configuration" ]; then
    cmp -s "$here/agent.yaml" "$configuration" || {
      put 644 "$here/agent.yaml" "$configuration.dist"
      echo "kept $configuration; the new default is $configuration.dist"
    }
  else
    put 644 "$here/agent.yaml" "$configuration"
  fi
  echo "installed $program: $version"
  if has_systemd; then
    systemctl daemon-reload
    systemd-tmpfiles --create "$temporary"
    systemctl try-restart millstream-agent.service 'millstream-pki@*.service' || complain "a service did not come back: see \`journalctl -u 'millstream-*'\`"
    systemctl is-active --quiet millstream-agent.service ||
      echo "next: put ca.pem, revoked.pem, agent.pem and agent.key into /etc/millstream, then: systemctl enable --now millstream-agent"
  else
    echo "next: put ca.pem, revoked.pem, agent.pem and agent.key into $DESTDIR/etc/millstream, then have this host start: $PREFIX/bin/millstream-agent serve"
  fi
}

[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || complain "run this as root"
case "${1:-}" in
  '') install ;;
  --uninstall) uninstall ;;
  *) complain "no such option: \`$1\`; there is --uninstall" ;;
esac
