defmodule Mix.Tasks.Compile.TinkexPython do
  @moduledoc false
  # The Python sources live beside the Elixir ones, but a release carries only ebin and priv of an
  # application: they become its priv/python, as a link here and as files in a release. What else is
  # linked is what Python needs to build a package of them (Tinkex.CustomLoss.Setup).
  use Mix.Task.Compiler

  @impl true
  def run(_args) do
    priv = Path.join(Mix.Project.app_path(), "priv")
    File.mkdir_p!(priv)

    for name <- ["python", "pyproject.toml", "README.md", "LICENSE"] do
      with {:error, reason} <-
             Mix.Utils.symlink_or_copy(Path.expand(name), Path.join(priv, name)),
           do: Mix.raise("cannot put #{name} into #{priv}: #{reason}")
    end

    {:noop, []}
  end
end

defmodule TinkexCustomLoss.MixProject do
  use Mix.Project

  # A checkout of Tinkex in which `mix compile` was run: the tests of the bridge then use it, and its
  # Nx and telemetry, where they have stand-ins otherwise. It has a build of its own, without them.
  @tinkex System.get_env("TINKEX_PATH")

  if @tinkex do
    [_ | _] = found = Path.wildcard(Path.join(@tinkex, "_build/*/lib/*/ebin"))
    Enum.each(found, &Code.append_path/1)
  end

  @version "0.1.0"
  @description "Custom losses for Tinker from Elixir: named, weighted regularizers, differentiated by PyTorch"

  def project do
    [
      app: :tinkex_custom_loss,
      version: @version,
      description: @description,
      elixir: "~> 1.14",
      elixirc_paths: elixirc_paths(Mix.env()),
      compilers: [:tinkex_python | Mix.compilers()],
      build_path: if(@tinkex, do: "_build/tinkex", else: "_build"),
      prune_code_paths: is_nil(@tinkex),
      test_paths: ["tests/elixir", "tests/bridge"],
      start_permanent: Mix.env() == :prod,
      deps: deps(),
      package: package(),
      docs: docs()
    ]
  end

  def application, do: [extra_applications: [:logger]]

  defp elixirc_paths(:test), do: ["elixir/lib", "tests/elixir/support"]
  defp elixirc_paths(_env), do: ["elixir/lib"]

  # Everything here is found at run time, and nothing needs it to compile or to pass the tests.
  # A dependency makes Mix ask to install Hex where it is missing, so none is declared there; nor
  # with TINKEX_CUSTOM_LOSS_DEPS=none, for a machine that has Hex but does not reach it.
  defp deps do
    if Code.ensure_loaded?(Hex) and System.get_env("TINKEX_CUSTOM_LOSS_DEPS") != "none" do
      [
        {:telemetry, "~> 1.0"},
        {:nx, "~> 0.9", optional: true},
        {:tinkex, "~> 0.4", optional: true},
        {:kino, "~> 0.12", optional: true},
        {:telemetry_metrics, "~> 1.0", optional: true},
        {:ex_doc, "~> 0.34", only: :dev, runtime: false}
      ]
    else
      []
    end
  end

  defp package do
    [
      licenses: ["Apache-2.0"],
      links: %{},
      files: [
        "elixir/lib",
        "python/tinker_custom_loss/**/*.{py,typed,css,js}",
        "pyproject.toml",
        "docs/**/*.{md,livemd}",
        "mix.exs",
        ".formatter.exs",
        "README.md",
        "CHANGELOG.md",
        "LICENSE"
      ]
    ]
  end

  # The reference of the Python names is made by the site alone.
  defp docs do
    [
      main: "Tinkex.CustomLoss",
      source_ref: "v#{@version}",
      extras:
        ["README.md", "CHANGELOG.md", "LICENSE"] ++
          (Path.wildcard("docs/**/*.{md,livemd}") -- ["docs/reference.md"])
    ]
  end
end
