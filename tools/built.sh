# Sourced by its neighbours. `built NAME SETTING…` builds lmfuse a second time, in build/NAME, with
# these settings of scikit-build-core; after that `$python -S` runs on it: an interpreter without its
# site directories, whose editable install would win.
python=${PYTHON:-python}

built() {
  folder=build/$1
  shift
  for setting; do
    shift
    set -- "$@" --config-settings "$setting"
  done
  "$python" -m pip install --quiet --no-deps --no-build-isolation --upgrade --target "$folder/site" \
    --config-settings "build-dir=$folder/cmake" "$@" .
  packages=$("$python" -c "import sys; print(':'.join(p for p in sys.path if 'site-packages' in p))")
  export PYTHONPATH="$PWD/$folder/site:$packages"
}
