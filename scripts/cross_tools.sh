#!/bin/sh
# cross_tools.sh DIR puts a C++ compiler for aarch64 and an emulator into DIR, as DIR/c++ and DIR/qemu, for testing the
# Arm kernels on an x86-64 machine. They are Debian's packages, unpacked there and not installed: no root needed.
# Where they can't be had it says so and fails; the tests that need them are then skipped.
set -eu
mkdir -p "$1"
cd "$1"
rm -rf c++ qemu root ./*.deb
if [ "$(uname -m)" != x86_64 ] || ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
  echo "No Debian packages for x86-64 here" >&2
  exit 1
fi
version=$(apt-cache depends g++-aarch64-linux-gnu 2>/dev/null | sed -n 's/.*Depends: g++-\([0-9]*\)-aarch64-linux-gnu.*/\1/p')
arm=aarch64-linux-gnu
if [ -z "$version" ] || ! apt-get download -qq -o APT::Sandbox::User=root \
  g++-"$version"-$arm gcc-"$version"-$arm cpp-"$version"-$arm binutils-$arm \
  libgcc-"$version"-dev-arm64-cross libstdc++-"$version"-dev-arm64-cross libc6-dev-arm64-cross libc6-arm64-cross \
  linux-libc-dev-arm64-cross libgcc-s1-arm64-cross libstdc++6-arm64-cross qemu-user-static; then
  echo "Debian's packages can't be had (apt-get update?)" >&2
  exit 1
fi
for package in *.deb; do
  dpkg -x "$package" root
done
rm ./*.deb
cat >c++ <<END
#!/bin/sh
here=\$(dirname "\$0")/root/usr
export LD_LIBRARY_PATH="\$here/lib/x86_64-linux-gnu"
exec "\$here/bin/$arm-g++-$version" -B"\$here/bin/" "\$@"
END
chmod +x c++
ln -s root/usr/bin/qemu-aarch64-static qemu
