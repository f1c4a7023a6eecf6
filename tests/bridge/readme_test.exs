defmodule Tinkex.CustomLoss.ReadmeTest do
  # Changes the working directory.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO, only: [with_io: 1]
  import ExUnit.CaptureLog

  alias Tinkex.CustomLoss.Pool.Python
  alias Tinkex.CustomLoss.Test.SandboxServer
  alias Tinkex.Types.{Datum, ModelInput, TensorData}

  @root Path.expand("../..", __DIR__)
  @readme Path.join(@root, "README.md")
  @tinkex Code.ensure_loaded?(Tinkex.TrainingClient)
  # Where guides have a sandbox.
  @sandbox "http://127.0.0.1:8000"

  # Each code block with the number of lines above it. One below <!-- tinkex --> needs Tinkex.
  defp blocks(document, language) do
    text = File.read!(document)

    for [{start, length}] <-
          Regex.scan(~r/^```#{language}\n\K.*?(?=^```$)/ms, text, return: :index),
        above = binary_part(text, 0, start),
        @tinkex or not String.ends_with?(above, "<!-- tinkex -->\n```#{language}\n") do
      {length(String.split(above, "\n")) - 1, binary_part(text, start, length)}
    end
  end

  # Runs the Elixir blocks in order, on the Python files shown beside them.
  defp run(document, dir, bindings \\ []) do
    for {_, code} <- blocks(document, "python"),
        [_, name] <- [Regex.run(~r/\A# (\w+\.py)\n/, code)],
        do: File.write!(Path.join(dir, name), code)

    File.cd!(dir, fn ->
      Enum.reduce(blocks(document, "elixir"), bindings, fn {above, code}, bindings ->
        code = if code =~ @sandbox, do: String.replace(code, @sandbox, sandbox!()), else: code
        {_, bindings} = Code.eval_string(code, bindings, file: document, line: above + 1)
        bindings
      end)
    end)
  end

  defp sandbox! do
    SandboxServer.start!().url
  end

  @tag :tmp_dir
  test "README.md", %{tmp_dir: dir} do
    {bindings, log} = with_log(fn -> run(@readme, dir) end)
    # Without data there are no tokens of a prompt to be warned of.
    refute log =~ ~s(neither "weights" nor "mask")
    record = bindings[:output].record
    # Nobody said which step it is.
    assert record["schedule_step"] == nil
    assert_in_delta record["loss_total"], 5.0419, 5.0e-5
    assert_in_delta record["regularizers"]["smoothness"]["contribution"], 0.268, 5.0e-5
  end

  for guide <- Path.wildcard(Path.join(@root, "docs/*.md")),
      name = Path.basename(guide),
      File.read!(guide) =~ "```elixir" do
    @tag :tmp_dir
    test "docs/#{name}", %{tmp_dir: dir} do
      given = if @tinkex, do: given(unquote(name)), else: []
      {bindings, printed} = with_io(fn -> run(unquote(guide), dir, given) end)
      # What it shows in a block of text is what it prints.
      for {_, shown} <- blocks(unquote(guide), "text"), do: assert(printed =~ shown)
      check(unquote(name), bindings)
    end
  end

  # What a guide takes as given.
  defp given("migrating-from-tinkex-regularizer.md") do
    config = apply(Tinkex.Config, :new, [[base_url: sandbox!(), api_key: "tml-sandbox"]])
    {:ok, service} = apply(Tinkex.ServiceClient, :start_link, [[config: config]])

    {:ok, client} =
      apply(Tinkex.ServiceClient, :create_lora_training_client, [
        service,
        "sandbox",
        [call_timeout: 60_000]
      ])

    datum = %Datum{
      model_input: ModelInput.from_ints([1, 2]),
      loss_fn_inputs: %{
        "target_tokens" => %TensorData{data: [2, 3], dtype: :int64, shape: [2]},
        "weights" => %TensorData{data: [1.0, 1.0], dtype: :float32, shape: [2]}
      }
    }

    [client: client, datums: [datum]]
  end

  defp given(_guide), do: []

  # What a guide cannot show by itself.
  defp check("erlport.md", bindings) do
    program = """
    import base64, sys
    from tinker_custom_loss.port import erlport
    from tinker_custom_loss.port.messagepack import unpack
    print(unpack(erlport.compute(base64.b64decode(sys.argv[1]))).fields["loss_total"])
    """

    {:ok, python} = Python.find(nil)
    env = [{"PYTHONPATH", Path.join(@root, "python")}]
    request = Base.encode64(bindings[:request])
    assert System.cmd(python, ["-c", program, request], env: env) == {"1.25\n", 0}
  end

  defp check(_guide, _bindings), do: :ok
end
