defmodule Tinkex.CustomLoss.RegularizerTest do
  use ExUnit.Case, async: true
  doctest Tinkex.CustomLoss.Regularizer

  alias Tinkex.CustomLoss.{Regularizer, RequestError, Terms}

  @valid %{name: "kl", fn: :kl, weight: 0.1}

  defp message(given),
    do: Exception.message(assert_raise(ArgumentError, fn -> Regularizer.new!(given) end))

  test "comes from a map, a keyword list, string keys, or itself" do
    expected = %Regularizer{name: "kl", fn: "kl", weight: 0.1}
    assert Regularizer.new!(@valid) == expected
    assert Regularizer.new!(Keyword.new(@valid)) == expected
    assert Regularizer.new!(%{"name" => "kl", "fn" => "kl", "weight" => 0.1}) == expected
    assert Regularizer.new!(%{@valid | name: :kl}) == expected
    assert Regularizer.new!(expected) == expected
  end

  for {key, value, expected} <- [
        {:weight, :nan, "a finite number, or a function of the step"},
        {:weight, "0.1", "a finite number, or a function of the step"},
        {:fn, nil, ~s(the atom of a built-in term, such as :l2, or "module:function")},
        {:fn, 5, ~s(the atom of a built-in term, such as :l2, or "module:function")},
        {:params, [1], "a map or keyword list"},
        {:timeout, 0, "a positive number of milliseconds or nil"},
        {:run_in_executor, :thread, "one of false, true, :process"},
        {:on_error, :ignore, "one of :raise, :skip"},
        {:on_non_finite, :clip, "one of :raise, :skip, :zero"},
        {:reduction, 5,
         "one of :token_sum, :token_mean, :sequence_mean_token_mean, :sequence_mean_token_sum"},
        {:reduction, :token_men,
         "one of :token_mean, :token_sum, :sequence_mean_token_sum, :sequence_mean_token_mean"},
        {:enabled, nil, "one of true, false"}
      ] do
    test "refuses #{inspect(value)} for :#{key}" do
      assert message(Map.put(@valid, unquote(key), unquote(value))) ==
               "invalid value for :#{unquote(key)} of regularizer \"kl\": " <>
                 "expected #{unquote(expected)}, got: #{inspect(unquote(value))}"
    end
  end

  test "is called as its function, unless it has a name" do
    for fun <- [:kl, "kl", "my_losses:kl"], keys <- [&Atom.to_string/1, & &1] do
      assert %Regularizer{name: "kl", fn: name} =
               Regularizer.new!(%{keys.(:fn) => fun, keys.(:weight) => 0.1})

      assert name == to_string(fun)
    end

    assert message(fn: :kl, weight: :heavy) =~ ~s(invalid value for :weight of regularizer "kl")
    two = [%{fn: :kl, weight: 1}, %{fn: "kl", weight: 2}]
    error = assert_raise(ArgumentError, fn -> Regularizer.list!(two) end)
    assert Exception.message(error) =~ ~s(two regularizers are named "kl")
  end

  test "has a reduction, as an atom or a string" do
    for reduction <- [:token_mean, "token_mean"], key <- [:reduction, "reduction"] do
      given = @valid |> Map.new(fn {k, v} -> {if(is_atom(key), do: k, else: "#{k}"), v} end)
      assert %{reduction: "token_mean"} = Regularizer.new!(Map.put(given, key, reduction))
    end

    assert %{reduction: nil} = Regularizer.new!(@valid)
  end

  test "refuses a name that is none" do
    for name <- ["", "  ", nil, true, 5, <<255>>] do
      assert message(%{@valid | name: name}) =~ "expected a string that is not empty, or an atom"
    end
  end

  test "says which key is missing, or is too much" do
    assert message(%{name: "kl", fn: :kl}) ==
             ~s(regularizer "kl" lacks :weight; it needs :fn and :weight)

    assert message(%{weight: 1}) =~ "a regularizer lacks :fn"
    assert message(Map.put(@valid, :wieght, 1)) =~ ~s(regularizer "kl" has no option :wieght; its)
    assert message(Map.put(@valid, "wieght", 1)) =~ ~s(has no option "wieght"; its options are)
    assert message(:kl) =~ "expected a regularizer to be a map or keyword list"
  end

  test "counts in seconds on the wire" do
    assert %{timeout: 1.5} =
             Regularizer.to_wire(Regularizer.new!(Map.put(@valid, :timeout, 1_500)))
  end

  test "that names a term which is not there gets the nearest first" do
    request = %{base_loss: nil, regularizers: [%{name: "close", fn: "entropi"}]}
    known = Map.new(~w(nll l2 entropy kl my_losses:topology), &{&1, %{}})
    assert {:error, %RequestError{} = error} = Terms.check(request, known)
    assert error.path == "regularizers[0].fn"
    sentence = Exception.message(error)
    assert sentence =~ ~s(there is no term :entropi for regularizer "close"; there are :entropy, )
    assert sentence =~ ~s("my_losses:topology")
    assert sentence =~ ":load"
    assert Terms.check(%{request | regularizers: [%{name: "a", fn: "kl"}]}, known) == :ok

    many = Map.merge(known, Map.new(1..20, &{"zz_#{&1}", %{}}))
    assert {:error, %RequestError{} = error} = Terms.check(request, many)
    sentence = Exception.message(error)

    assert sentence =~
             ~r/"close"; of 25, the nearest are :entropy, \S+, \S+\. Functions of your own/

    refute sentence =~ "zz_"
  end
end
