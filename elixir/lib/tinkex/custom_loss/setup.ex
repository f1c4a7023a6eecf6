defmodule Tinkex.CustomLoss.SetupError do
  @moduledoc "The Python environment was not made; the message says why, and what to do."
  defexception [:message]

  @type t :: %__MODULE__{message: String.t()}
end

defmodule Tinkex.CustomLoss.Setup.Progress do
  @moduledoc false
  # What an installer says, collected; what takes long, its large downloads, is told as it begins.

  @enforce_keys [:say]
  defstruct [:say]

  @large ~r/\A *Downloading ([^ ]+ \([\d.]+ ?[MG]i?B\))/

  @doc false
  def tell(line, say),
    do: with([_, download] <- Regex.run(@large, line), do: say.("downloading " <> download))

  defimpl Collectable do
    alias Tinkex.CustomLoss.Setup.Progress

    def into(%{say: say}) do
      collect = fn
        {said, line}, {:cont, text} ->
          {lines, [rest]} = (line <> text) |> String.split("\n") |> Enum.split(-1)
          Enum.each(lines, &Progress.tell(&1, say))
          {[said, text], rest}

        {said, _line}, :done ->
          IO.iodata_to_binary(said)

        _said, :halt ->
          :ok
      end

      {{[], ""}, collect}
    end
  end
end

defmodule Tinkex.CustomLoss.Setup do
  @moduledoc false
  # Makes a Python environment. This is all that `Tinkex.CustomLoss.setup!/1`, the Mix task and the
  # step of a release do, and needs no Mix: the sources are those in priv, see mix.exs.
  #
  # An environment is used where it is made, since it knows its own path; so it cannot be made aside
  # and renamed. Instead a stamp in it says what it is: being made, by which process, or made from
  # what. What is being made by nobody any more is half an environment, and is made anew.

  alias Tinkex.CustomLoss.{Options, SetupError}
  alias Tinkex.CustomLoss.Pool.Python
  alias Tinkex.CustomLoss.Setup.Progress

  @stamp ".tinkex_custom_loss"
  @pythons ~w(python3 python3.14 python3.13 python3.12 python3.11)

  @doc """
  Makes the environment, or completes the one that is there; returns the path of its Python.

  `options` are those of `Options.setup!/1`.
  """
  @spec run(map()) :: Path.t()
  def run(options) do
    options = %{options | dir: Path.expand(options.dir)}
    lock = {{__MODULE__, options.dir}, self()}

    # Of a process, and not of its OS process: a cell of a notebook can be stopped.
    with :aborted <- :global.trans(lock, fn -> make_or_complete(options) end, [node()], 0),
         do: fail!("another process is making the environment in #{options.dir}: wait for it")
  end

  defp make_or_complete(options) do
    if options.torch == :cpu and options.torch_index == nil and not knows_cpu?() do
      fail!(
        "for torch: :cpu without uv, name the index of PyTorch's CPU builds in :torch_index, or " <>
          "--torch-index (pytorch.org shows it under \"Get started\"); or put uv on PATH, which knows it"
      )
    end

    given = options.python && base_python!([options.python], options.python)
    python = Path.join(options.dir, "bin/python")

    case state(options.dir, python) do
      :absent ->
        make(options, python, given)

      :abandoned ->
        say("the environment in #{options.dir} is unfinished: making it anew")
        File.rm_rf!(options.dir)
        make(options, python, given)

      {:made, stamp} ->
        if stamp == stamp(options),
          do: say("the environment in #{options.dir} is complete"),
          else: complete(options, python)
    end

    python
  end

  # What pip gets for other systems is for the CPU anyway.
  defp knows_cpu?, do: uv() != nil or :os.type() != {:unix, :linux}

  defp state(dir, python) do
    stamp = read_stamp(dir)

    case stamp do
      "being made by " <> os_pid ->
        if os_pid != System.pid() and running?(os_pid) do
          fail!(
            "OS process #{os_pid} is making the environment in #{dir}: wait until it is done; " <>
              "if that is another program, remove the directory"
          )
        end

        :abandoned

      stamp ->
        cond do
          File.exists?(python) ->
            {:made, stamp}

          File.ls(dir) in [{:ok, []}, {:error, :enoent}] ->
            :absent

          true ->
            fail!(
              "#{dir} is there, and is no Python environment: name another directory with :dir"
            )
        end
    end
  end

  @doc "Whether a Python is that of an environment whose making was broken off, or goes on."
  @spec unfinished?(Path.t()) :: boolean()
  def unfinished?(python) do
    stamp = python |> Path.dirname() |> Path.dirname() |> read_stamp()
    is_binary(stamp) and String.starts_with?(stamp, "being made by ")
  end

  defp read_stamp(dir) do
    case File.read(Path.join(dir, @stamp)) do
      {:ok, text} -> String.trim(text)
      {:error, _} -> nil
    end
  end

  defp write_stamp(dir, text), do: File.write!(Path.join(dir, @stamp), text <> "\n")

  defp running?(os_pid) do
    match?({_, 0}, System.cmd("/bin/sh", ["-c", "kill -0 #{os_pid}"], stderr_to_stdout: true))
  end

  # What an environment was made from.
  defp stamp(options) do
    project = File.read!(Path.join(priv(), "pyproject.toml"))

    [options.extras, options.torch, options.torch_index, options.args, project]
    |> :erlang.term_to_binary()
    |> :erlang.md5()
    |> Base.encode16()
  end

  defp make(%{dir: dir} = options, python, given) do
    uv = uv()
    base = given || base_python!(@pythons, nil)
    say("making an environment in #{dir} with #{base}#{if uv, do: " and uv"}")
    File.mkdir_p!(dir)

    try do
      write_stamp(dir, "being made by #{System.pid()}")
      # In a new project nobody has told git yet.
      File.write!(Path.join(dir, ".gitignore"), "*\n")

      if uv,
        do: cmd!(uv, ["venv", "--quiet", "--allow-existing", "--python", base, dir], options),
        else: cmd!(base, ["-m", "venv", dir], options)

      install(options, python)
    rescue
      error ->
        File.rm_rf!(dir)
        reraise error, __STACKTRACE__
    end
  end

  defp complete(options, python) do
    say("using the environment in #{options.dir}")
    install(options, python)
  end

  # From a copy, so that building leaves nothing among the sources.
  defp install(options, python) do
    # A name that nobody else has, nor can prepare: others use the directory, too.
    name = "tinker-custom-loss-#{System.pid()}-#{:rand.uniform(0x1_0000_0000_0000)}"
    copy = Path.join(System.tmp_dir!(), name)
    File.mkdir!(copy)

    try do
      # In priv they are links, where this is no release.
      for name <- ["pyproject.toml", "README.md", "LICENSE", "python"] do
        File.cp_r!(Path.join(priv(), name), Path.join(copy, name), dereference_symlinks: true)
      end

      extras = if options.extras == [], do: "", else: "[#{Enum.join(options.extras, ",")}]"
      say("installing the package, PyTorch and tinker (minutes, the first time)")
      install(uv(), python, copy <> extras, options)
    after
      File.rm_rf!(copy)
    end

    with {:error, error} <- Python.check(python, Options.start!([])),
         do: fail!("the installation is not complete: " <> Exception.message(error))

    write_stamp(options.dir, stamp(options))
  end

  defp install(uv, python, target, options) do
    install =
      if uv,
        do: [uv, "pip", "install", "--python", python],
        else: [python, "-m", "pip", "install", "--disable-pip-version-check"]

    [program | install] = install

    # Before the rest, which is content with it. An index of PyTorch has old versions of some of the
    # rest and none of others; uv would take the former.
    if options.torch_index do
      from = ["--index-url", options.torch_index, torch(options) || "torch"]
      cmd!(program, install ++ from, options)
    end

    backend =
      if uv && options.torch == :cpu && !options.torch_index,
        do: ["--torch-backend", "cpu"],
        else: []

    rest = [target | List.wrap(torch(options))] ++ options.args
    cmd!(program, install ++ backend ++ rest, options)
  end

  defp torch(%{torch: version}) when is_binary(version), do: "torch" <> version
  defp torch(_options), do: nil

  defp uv, do: System.find_executable("uv")

  defp base_python!(names, given) do
    found = for name <- names, path = System.find_executable(name), do: path

    cond do
      python = Enum.find(found, &new_enough?/1) ->
        python

      found != [] ->
        fail!("#{hd(found)} is older than Python 3.11; name a newer one with :python")

      given ->
        fail!("there is no #{given}: name a Python 3.11 or newer with :python")

      true ->
        fail!(
          "there is no python3 on PATH: install Python 3.11 or newer, or name one with :python"
        )
    end
  end

  defp new_enough?(python) do
    program = "import sys; print(sys.version_info >= (3, 11))"
    match?({"True" <> _, 0}, System.cmd(python, ["-c", program], stderr_to_stdout: true))
  end

  defp priv, do: Application.app_dir(:tinkex_custom_loss, "priv")

  defp cmd!(program, args, options) do
    into = if options.verbose, do: IO.stream(:stdio, :line), else: %Progress{say: &say/1}

    case System.cmd(program, args, into: into, stderr_to_stdout: true) do
      {_, 0} ->
        :ok

      {said, status} ->
        if is_binary(said), do: IO.puts(said)
        fail!("#{program} #{Enum.join(args, " ")} ended with status #{status}; see above")
    end
  end

  @spec fail!(String.t()) :: no_return()
  defp fail!(sentence), do: raise(SetupError, sentence)

  defp say(text), do: IO.puts("setup: " <> text)
end
